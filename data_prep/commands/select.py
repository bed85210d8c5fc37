"""`igpt-data select`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from data_prep.commands import (
    PATH,
    SOURCE_OPTION,
    Progress,
    place_of,
    refuse_inside,
    require_writable,
    where_options,
)
from igpt_ds.errors import UserError
from igpt_ds.options import Renamed
from igpt_ds.text import Table, aligned, visible

if TYPE_CHECKING:
    from data_prep.selection.collections import Collection
    from data_prep.selection.job import Selected
    from data_prep.sources import Pool

_COLLECTION = "SOURCE[,NAME=VALUE...]:PATH"


@click.command()
@click.argument("source_name", metavar="SOURCE")
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@SOURCE_OPTION
@click.option(
    "--like",
    "like",
    metavar=_COLLECTION,
    multiple=True,
    required=True,
    help="Training images that the pool's are to be like; may be repeated.",
)
@click.option(
    "--exclude",
    "exclude",
    metavar=_COLLECTION,
    multiple=True,
    help="Test images that none may be close to; may be repeated.",
)
@click.option(
    "--images", "number", cls=Renamed, former=["--number"], type=click.IntRange(min=1), required=True, help="Wanted."
)
@click.option(
    "--embedder",
    "embedder_name",
    metavar="NAME",
    required=True,
    help="What tells how alike images are: open_clip, timm, or tiny_pca for tests and rough use.",
)
@click.option("--model", help="Network of timm or open_clip, by the name it has there.")
@click.option("--weights", type=PATH, help="Its weights, a local file.")
@click.option(
    "--clusters",
    type=click.IntRange(1, 1 << 20),
    help="That the pool is divided into.  [default: one for each 64 images, at most 10000]",
)
@click.option(
    "--duplicate-distance",
    type=click.IntRange(0, 6),
    default=4,
    show_default=True,
    help="Bits of 64 in which the perceptual hashes of near duplicates differ at most.",
)
@click.option(
    "--evaluation-distance",
    type=click.IntRange(0, 8),
    default=6,
    show_default=True,
    help="The same, of images that count as close to one of --exclude.",
)
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, help="Of the clustering.")
@click.option("--work", type=PATH, required=True, help="Directory for what can be used again; may be deleted after.")
@click.option("--out", type=PATH, required=True, help="File to write, e.g. selection.npz.")
@where_options
def select(
    *,
    source_name: str,
    paths: tuple[str, ...],
    options: dict[str, str],
    like: tuple[str, ...],
    exclude: tuple[str, ...],
    number: int,
    embedder_name: str,
    model: str | None,
    weights: Path | None,
    clusters: int | None,
    duplicate_distance: int,
    evaluation_distance: int,
    seed: int,
    work: Path,
    out: Path,
    **where: Any,
) -> None:
    """Select the images of a pool that are most like other images: web images like ImageNet.

    The pool is divided into clusters, of which those are kept that images of --like fall into; of these the
    images nearest to --like are taken. Exact and near duplicates are dropped, and images close to --exclude.
    The file goes to igpt-data shards --selection; beside it are a histogram of the similarities and a contact
    sheet, which show whether the choice is good. A run that was stopped continues when the same command is
    given again, and other settings use what is in --work.

    tiny_pca needs no weights but knows layout and colour only: use it to try things out.

    \b
    100 million images of a crawl, like ImageNet, none from the test sets:
      igpt-data select img2dataset CRAWL --like imagenet:ILSVRC2012 \\
          --exclude imagenet:ILSVRC2012 --exclude cifar10:CIFAR10 --exclude cifar100:CIFAR100 \\
          --exclude stl10:STL10 --images 100000000 --embedder open_clip --model ViT-B-32 \\
          --weights open_clip_model.safetensors --work WORK --out selection.npz --workers 8
    A first try without weights:
      igpt-data select img2dataset CRAWL --like image_folder:IMAGES --images 10000 \\
          --embedder tiny_pca --work WORK --out selection.npz
    """
    from data_prep.selection.collections import Collection
    from data_prep.selection.embedders import open_embedder
    from data_prep.selection.job import Job, Settings
    from data_prep.sources import open_source

    refuse_inside(source_name, paths, out, work)
    for text in (*like, *exclude):
        refuse_inside(text.partition(":")[0].partition(",")[0], [text.partition(":")[2]], out, work)
    require_writable(out)
    with place_of(work / "jobs", where) as place:
        job = Job(
            pool=Collection(open_source(source_name, paths, options), "train", _where(source_name, paths, options)),
            like=[_collection("--like", text, "train") for text in like],
            evaluations=[_collection("--exclude", text, "test") for text in exclude],
            embedder=open_embedder(embedder_name, model, weights),
            settings=Settings(number, clusters, duplicate_distance, evaluation_distance, seed),
            work=work,
        )
        selected = job.run(out, place, Progress)
    if selected is None:
        click.echo(visible(f"{out}: {place.pending}"))
        return
    _show(out, number, job.evaluations, selected)


def _collection(option: str, text: str, pool: "Pool") -> "Collection":
    """SOURCE[,NAME=VALUE...]:PATH, opened."""
    from data_prep.selection.collections import Collection
    from data_prep.sources import open_source

    head, _, path = text.partition(":")
    name, *pairs = head.split(",")
    split = [pair.partition("=") for pair in pairs]
    if not path or not all(key and equals for key, equals, _ in split):
        raise UserError(f"{option} {text}: is not {_COLLECTION}: give for example imagenet:ILSVRC2012")
    options = {key: value for key, _, value in split}
    return Collection(open_source(name, (path,), options), pool, _where(name, (path,), options))


def _where(name: str, paths: tuple[str, ...], options: dict[str, str]) -> str:
    """The same for the same images, from whichever directory the command is given."""
    from data_prep.sources import recorded

    absolute = [path if "://" in path else str(Path(path).absolute()) for path in paths]
    settled = sorted(recorded(name, options).items())
    return " ".join([name, *(f"{key}={value}" for key, value in settled), *absolute])


def _read(collections: list[dict[str, Any]]) -> str:
    images, unreadable = (sum(each[key] for each in collections) for key in ("images", "unreadable"))
    return f"{images:,} images" + (f", and {unreadable:,} that cannot be read" if unreadable else "")


def _show(out: Path, number: int, evaluations: "list[Collection]", selected: "Selected") -> None:
    selection = selected.selection
    dropped = [(f"- {why}", count) for why, count in selection.dropped.items()]
    rows = [("images", selection.inputs), *dropped, ("kept", selection.images)]
    reasons = ", ".join(f"{why} {n:,}" for why, n in sorted(selected.unreadable.items()))
    notes = {
        "- unreadable": reasons,
        "- outside clusters": f"{selected.clusters - selected.hit:,} of {selected.clusters:,} clusters",
        "- close to evaluation": "" if evaluations else "no --exclude was given",
        "- below threshold": f"similarity below {selected.cut.threshold:.4f}" if selected.cut else "",
        "kept": "" if selection.images == number else f"fewer than the {number:,} wanted: the pool has no more",
    }
    counted = [(name, f"{count:,}", f"{count / selection.inputs:.2%}", notes.get(name, "")) for name, count in rows]
    click.echo(Table("", ["images of the pool", "number", "share", ""], counted).text())
    files = [
        ("like", _read(selection.settings["like"])),
        ("exclude", _read(selection.settings["evaluations"])),
        ("selection", str(out)),
        ("sha256", selection.sha256),
        ("look at", " ".join(str(path) for path in selected.pictures)),
    ]
    click.echo(aligned(files))
