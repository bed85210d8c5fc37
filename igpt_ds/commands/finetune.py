"""`igpt-ds finetune`."""

from pathlib import Path
from typing import Any

import click

from igpt_ds.commands import CONTEXT, run_of, training_options
from igpt_ds.options import Renamed


@click.command(context_settings=CONTEXT)
@click.option(
    "--from",
    "weights",
    metavar="RUN",
    type=click.Path(path_type=Path),
    help="Pre-training: a run, a checkpoint, or any format.",
)
@click.option("--from-scratch", "scratch", is_flag=True, help="Random weights: the model of --preset, or of --from.")
@click.option("--preset", metavar="NAME", help="With --from-scratch: tiny, s, m, l, ... or a file.toml.")
@click.option("--data", metavar="DIR", help="Folder with labelled train/ and val/.")
@click.option(
    "--split",
    cls=Renamed,
    flags={"--test": "test"},
    type=click.Choice(["val", "test"]),
    default="val",
    show_default=True,
    help="Whose images the best checkpoint is scored by; DIR/test is read once, at the end.",
)
@click.option(
    "--masks", type=click.IntRange(1, 1000), help="BERT: also the modal prediction of so many masks.  [default: 5]"
)
@training_options
def finetune(
    weights: Path | None,
    scratch: bool,
    preset: str | None,
    data: str | None,
    split: str,
    masks: int | None,
    run_path: Path | None,
    run_option: Path | None,
    overrides: tuple[str, ...],
    ds: str | None,
    fresh: bool,
    **options: Any,
) -> None:
    """Fine-tune a model to classify; a run that holds a checkpoint goes on by itself.

    \b
    As the paper does for CIFAR, on one machine with 8 GPUs:
        deepspeed --num_accelerators 8 --module igpt_ds finetune runs/l-cifar10 --from runs/l --data cifar10 \\
            --set finetune.augmentation=crop_flip --split test
    Without the generative loss:
        igpt-ds finetune A --from RUN --data DATA --set finetune.generative_weight=0
    From random weights, which learn to classify alone; or both, by --set finetune.generative_weight=1:
        igpt-ds finetune B --from RUN --from-scratch --data DATA --set finetune.dropout=0.1
    The final run, on train/ and val/ together, for as many steps as were best:
        igpt-ds finetune C --from RUN --data DATA --split test --set data.fold_validation=true --set training.steps=N
    On 4 labels a class, drawn by the seed; the best step is still chosen on all of val/:
        igpt-ds finetune D --from RUN --data DATA --split test --set finetune.labels=4
    Go on with a run:
        igpt-ds finetune A

    The rate is constant, a tenth of the pre-training's; validated once an epoch, it ends after 5 validations without a
    better accuracy, or after 50 epochs. The best checkpoint is kept; RUN/result.json tells its accuracy.
    """
    from igpt_ds.features.masks import VOTES
    from igpt_ds.train.begin import finetuning
    from igpt_ds.train.launch import launch

    run = run_of(run_path, run_option)
    asked = finetuning(weights, preset, run, data, overrides, ds, scratch, fresh)
    masks = VOTES if masks is None and not asked.config.causal else masks
    if text := launch(asked, run, fresh=fresh, test=split == "test", masks=masks, **options):
        click.echo(text)
