"""The model card of a Hugging Face directory: what the network is, how it was trained, how it is used."""

import math

from igpt_ds.config.schema import Config
from igpt_ds.dataset.palette import Palette
from igpt_ds.run.directory import Run
from igpt_ds.run.metrics import read_validations
from igpt_ds.weights.base import Weights

_USE = """\
```python
import torch
from transformers import AutoImageProcessor, {kind}

model = {kind}.from_pretrained(FOLDER)
processor = AutoImageProcessor.from_pretrained(FOLDER)
tokens = torch.as_tensor(processor(image, return_tensors="pt").input_ids)
start = torch.full((len(tokens), 1), {k})  # stands before the first pixel
logits = model(torch.cat([start, tokens[:, :-1]], dim=1)).logits
```
"""


def card(weights: Weights, config: Config, palette: Palette | None, kind: str, classifier: bool) -> str:
    """README.md of the directory; tells nothing of the machine that it was trained on.

    Args:
        kind: their class that it is read by.
        classifier: whether that is the one with a class head.
    """
    side, recipe = config.data.resolution, config.training
    task = "image-classification" if classifier else "unconditional-image-generation"
    objective = "autoregressive (next pixel)" if config.causal else "BERT (masked pixels)"
    elements = sum(math.prod(facts["shape"]) for facts in weights.tensors.values())
    rows = [
        ("parameters", f"{elements:,}"),
        ("network", f"{config.model.layers} layers of width {config.model.width}, {config.model.heads} heads"),
        ("objective", objective + (f", fine-tuned to {config.classes} classes" if classifier else "")),
        ("images", f"{side} x {side} pixels in a palette of {config.palette_size} colours"),
        ("palette, sha256", palette.sha256 if palette else "not known"),
        ("training", f"{weights.step:,} of {recipe.steps:,} steps of {recipe.batch} images, {recipe.precision}"),
        ("learning rate", f"{recipe.learning_rate:g}, Adam ({recipe.beta1:g}, {recipe.beta2:g}), {recipe.schedule}"),
        *((("validation loss", loss),) if (loss := _loss(weights)) else ()),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    use = _USE.format(kind=kind, k=config.palette_size) if config.causal else ""
    return (
        f"---\nlibrary_name: transformers\npipeline_tag: {task}\ntags:\n- image-gpt\n---\n\n# {config.name}\n\n"
        "An [Image GPT](https://proceedings.mlr.press/v119/chen20s.html) (Chen et al., ICML 2020), exported by "
        f"igpt-ds.\n\n| | |\n|---|---|\n{table}\n\n## Use\n\n{use}\n"
        "`igpt-ds probe`, `eval`, `sample` and `igpt_ds.load` take this folder as it is.\n"
    )


def _loss(weights: Weights) -> str:
    """Of a run's checkpoint that was validated; "" where it is not known."""
    run = Run(weights.path.parent.parent)
    if weights.path.parent != run.checkpoints:
        return ""
    for line in read_validations(run.metrics):
        if line["step"] == weights.step and isinstance(line["val_loss"], float):
            return f"{line['val_loss']:.4f} nats a token, {line.get('val_images', 0):,} images"
    return ""
