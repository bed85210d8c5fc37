"""`igpt-data inspect`."""

from pathlib import Path
from typing import Any

import click

from data_prep.commands import PATH, require_writable
from igpt_ds.options import JSON, Renamed, show
from igpt_ds.text import aligned

_CLASSES_SHOWN = 10


@click.command()
@click.argument("directory", type=PATH)
@JSON
@click.option("--out", type=PATH, help="Folder for samples.png, palette.png and tokens.png.")
@click.option(
    "--images",
    cls=Renamed,
    former=["--sample"],
    type=click.IntRange(min=1),
    default=4096,
    show_default=True,
    help="Images whose tokens are counted; as many as there are, or more, reads all.",
)
def inspect(directory: Path, json_path: Path | None, out: Path | None, images: int) -> None:
    """Tell what is in a dataset, and draw it.

    The token figures are of a sample spread evenly over the dataset; igpt-data verify reads all of it.

    \b
    Example:
      igpt-data inspect DATA/train --out pictures
    """
    from data_prep.check.inspection import inspect as look

    if json_path not in (None, Path("-")):
        require_writable(json_path)
    if out is not None:
        require_writable(out / "samples.png")
    found = look(directory, images)
    pictures = None
    if out is not None:
        from data_prep.check.pictures import save_all

        pictures = save_all(found, out)
    rows = _lines(found.facts)
    drawn = [(f"{name}.png", path) for name, path in (pictures or {}).items()]
    show(aligned([*rows, *drawn]), {**found.facts, "pictures": pictures}, json_path)


def _lines(facts: dict[str, Any]) -> list[tuple[str, str]]:
    rows, tokens, transform = facts["rows_per_shard"], facts["tokens"], facts["transform"]
    bits, most = tokens["entropy_bits"], tokens["most_used_share"]
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in facts["rejects"].items())
    looked = "all" if tokens["rows_sampled"] == tokens["rows"] else f"{tokens['rows_sampled']:,} of {tokens['rows']:,}"
    return [
        ("dataset", f"{facts['directory']} ({facts['split']} split of {facts['source']})"),
        ("images", f"{facts['rows']:,} in {facts['views']} view(s), {facts['resolution']} x {facts['resolution']}"),
        *_class_lines(facts["classes"]),
        ("shards", f"{facts['shards']:,} of {rows['smallest']:,} to {rows['largest']:,} rows"),
        ("size", f"{facts['bytes'] / 1e6:,.1f} MB, {facts['bytes_per_sample']:,.1f} bytes a row ({facts['storage']})"),
        ("transform", ", ".join(f"{key} {value}" for key, value in transform.items())),
        ("rejected", f"{facts['rejected']:,}" + (f" ({reasons})" if reasons else "")),
        ("palette", f"{facts['palette']['k']} colours, sha256 {facts['palette']['sha256'][:16]}"),
        ("tokens", f"{facts['sequence_length']:,} a row; looked at {looked} images"),
        ("entropy", f"{bits:.4f} bits ({tokens['entropy_nats']:.4f} nats) a token, of the tokens' frequencies"),
        ("use", f"token {tokens['most_used']} is {most:.1%} of all; {tokens['unused']} never used"),
        ("versions", ", ".join(f"{name} {version}" for name, version in facts["versions"].items())),
    ]


def _class_lines(classes: list[dict[str, Any]] | None) -> list[tuple[str, str]]:
    if classes is None:
        return [("classes", "none: no labels")]
    rows = [each["rows"] for each in classes]
    lines = [("classes", f"{len(classes)} of {min(rows):,} to {max(rows):,} images")]
    for each in classes[:_CLASSES_SHOWN]:
        lines.append(("", f"{each['rows']:>9,}  {each['name']}"))
    if (more := len(classes) - _CLASSES_SHOWN) > 0:
        lines.append(("", f"{'':>9}  and {more:,} more: see --json"))
    return lines
