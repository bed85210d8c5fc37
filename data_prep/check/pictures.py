"""The pictures of `igpt-data inspect`: a contact sheet, the palette, and how often each token is used."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data_prep.check.inspection import Inspection, images_at, spread
from igpt_ds.atomic import publish_file

_COLUMNS = 8  # and as many rows, at most
_WIDTH = 2048  # pixels a side of a picture, about and at most
_TILE = 112  # pixels a side of an image, about
_GAP, _CAPTION = 8, 16
_SWATCH = 24
_GREY = 0.3  # difference of a colour's largest and smallest channel, of 2, below which its hue is hardly seen
_WHITE, _BLACK = (255, 255, 255), (40, 40, 40)


def save_all(inspection: Inspection, directory: Path) -> dict[str, str]:
    """Write all three as PNG files into `directory`.

    Returns:
        Their paths by name.
    """
    pictures = {"samples": contact_sheet(inspection), "palette": swatches(inspection.dataset.palette.colours)}
    paths = {name: directory / f"{name}.png" for name in (*pictures, "tokens")}
    for name, picture in pictures.items():
        with publish_file(paths[name]) as file:
            picture.save(file, "PNG")
    token_use(inspection, paths["tokens"])
    return {name: str(path) for name, path in paths.items()}


def contact_sheet(inspection: Inspection) -> Image.Image:
    """Images spread evenly over view 0, decoded from their tokens, each with its class's name where there is one."""
    dataset = inspection.dataset
    side = dataset.manifest.resolution
    columns = min(_COLUMNS, max(1, _WIDTH // side))
    count = min(columns**2, dataset.rows)
    chosen = np.array([first for first, _ in spread(dataset.rows, count, 1)])
    pixels = dataset.palette.decode(images_at(dataset, chosen)).reshape(count, side, side, 3)
    scale = max(1, _TILE // side)  # whole pixels only: what the model sees, not smoothed
    tile, caption = side * scale, _CAPTION if inspection.labels is not None else 0
    columns = min(columns, count)
    width, height = tile + _GAP, tile + _GAP + caption
    sheet = Image.new("RGB", (columns * width + _GAP, -(-count // columns) * height + _GAP), _WHITE)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for i, image in enumerate(pixels):
        left, top = _GAP + i % columns * width, _GAP + i // columns * height
        sheet.paste(Image.fromarray(image.repeat(scale, 0).repeat(scale, 1)), (left, top))
        if inspection.labels is not None:
            name = (dataset.manifest.classes or [])[inspection.labels[chosen[i]]]
            pen.text((left, top + tile + 1), _fitting(name, font, tile), _BLACK, font)
    return sheet


def swatches(colours: np.ndarray) -> Image.Image:
    """The palette, float32 [k, 3] in [-1, 1]: columns of greys, then columns by hue, each from dark to light."""
    height = max(1, round((len(colours) / 2) ** 0.5))
    columns = [group[i : i + height] for group in by_hue(colours) for i in range(0, len(group), height)]
    grid = np.full((height, len(columns), 3), 255, np.uint8)
    for x, column in enumerate(columns):
        chosen = colours[column[np.argsort(_luminance(colours[column]), kind="stable")]]
        grid[: len(column), x] = np.rint((chosen + 1) * 127.5)
    side = max(2, min(_SWATCH, _WIDTH // len(columns)))
    return Image.fromarray(grid.repeat(side, 0).repeat(side, 1))


def by_hue(colours: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices of colours [k, 3]: greys from dark to light; the others around the circle of hues."""
    red, green, blue = colours.astype(np.float64).T
    grey = colours.max(1) - colours.min(1) < _GREY
    # The hexagon's angle: 0 at red, a third of the circle at green; begun at pink, or reds would be at both ends.
    hue = (np.arctan2(3**0.5 * (green - blue), 2 * red - green - blue) + np.pi / 6) % (2 * np.pi)
    greys, others = np.flatnonzero(grey), np.flatnonzero(~grey)
    return greys[np.argsort(_luminance(colours[greys]), kind="stable")], others[np.argsort(hue[others], kind="stable")]


def token_use(inspection: Inspection, path: Path) -> None:
    """Share of each token in the sample, most used first, drawn in its colour, as a PNG."""
    from matplotlib.collections import PolyCollection
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    facts, counts = inspection.facts["tokens"], inspection.counts
    order = np.argsort(-counts, kind="stable")
    order = order[counts[order] > 0]
    figure = Figure(figsize=(9, 4), dpi=120, layout="constrained")
    axes = figure.subplots()
    share = counts[order] / counts.sum()
    left, low = np.arange(len(order)) - 0.5, np.full(len(order), share[-1] / 2)
    corners = np.array([[left, low], [left, share], [left + 1, share], [left + 1, low]])  # [4, 2, bars]
    colours = (inspection.dataset.palette.colours[order] + 1) / 2
    # One collection, for a palette may have 65536 colours; a dark line above, or light ones would be lost on white.
    axes.add_collection(PolyCollection(list(corners.transpose(2, 0, 1)), facecolors=colours, edgecolors="none"))
    axes.step(np.arange(len(order)), share, where="mid", color="black", linewidth=0.8)
    axes.set_facecolor("0.93")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
    axes.set_xlim(-0.5, len(order) - 0.5)
    axes.set_ylim(low[0], share[0] * 2)
    axes.set_xlabel(f"tokens, most used first, each in its colour ({facts['unused']} of {len(counts)} unused)")
    axes.set_ylabel("share of all tokens")
    axes.set_title(
        f"Use of the palette in {facts['rows_sampled']:,} of {facts['rows']:,} images: "
        f"{facts['entropy_bits']:.3f} bits a token of {np.log2(len(counts)):.3f}"
    )
    with publish_file(path) as file:
        figure.savefig(file, format="png")


def _luminance(colours: np.ndarray) -> np.ndarray:
    return colours @ np.array([0.2126, 0.7152, 0.0722])


def _fitting(name: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """A class's name on one line, cut to so many pixels."""
    text = "".join(c if c.isprintable() else "?" for c in name[:80])
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."
