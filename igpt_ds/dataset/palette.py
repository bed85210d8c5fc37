"""The colour palette: 24-bit colours to tokens by an exact table, and tokens back to colours.

A palette is k colours in the released convention: float32 in [-1, 1], where 8-bit level v is v / 127.5 - 1. A
colour's token is the index of its nearest entry by squared Euclidean distance in those units, computed in
float64 (float32 picks wrong neighbours for some colours); the lowest index wins a tie. There are only 2^24
colours, so all answers are worked out once into a table of 32 MiB, kept in the user's cache directory.

NumPy and the standard library only: shard-building workers import this file and must not load torch.
"""

import os
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from igpt_ds import hub
from igpt_ds.atomic import publish_file
from igpt_ds.dataset.npy import read_npy
from igpt_ds.errors import UserError
from igpt_ds.reading import parse_json, read_regular

CLUSTERS = "preprocessor_config.json"  # of a model of transformers
MAX_COLOURS = 1 << 16  # tokens are uint16
_MOST_BYTES = 1 << 24  # of a palette's file: in whatever type, a palette is far shorter
_LEVELS = 256
_SIDE = 8  # colours per side of a block of the table
_BLOCKS = _LEVELS // _SIDE
_MANY = 8  # entries left in a block, from which a second look saves time
_SLACK = 1e-9  # far above the rounding of squared distances, which are at most 12


@dataclass(frozen=True, eq=False)
class Palette:
    """k colours, float32 [k, 3] in [-1, 1], C order, read-only.

    Raises:
        UserError: another shape or dtype, k outside 1 to 65536, values not finite or out of range.
    """

    colours: np.ndarray

    def __post_init__(self) -> None:
        colours = self.colours
        if colours.dtype != np.float32 or colours.ndim != 2 or colours.shape[1] != 3:
            raise UserError(
                f"palette: expected float32 [k, 3], got {colours.dtype} {list(colours.shape)}: "
                "make one with igpt-data palette"
            )
        if not 1 <= len(colours) <= MAX_COLOURS:
            raise UserError(f"palette: {len(colours)} colours: choose from 1 to {MAX_COLOURS}")
        # NaN fails every comparison, so this also refuses what is not finite.
        if not (np.abs(colours) <= 1.0).all():
            raise UserError("palette: values outside [-1, 1]: scale 8-bit levels v by v / 127.5 - 1")
        colours = np.array(colours, dtype="<f4", order="C")
        colours.flags.writeable = False
        object.__setattr__(self, "colours", colours)

    def __reduce__(self) -> tuple[Any, ...]:
        # Only the colours travel to worker processes; each finds the table in the cache.
        return Palette, (np.array(self.colours),)

    @property
    def k(self) -> int:
        """Number of colours."""
        return len(self.colours)

    @cached_property
    def sha256(self) -> str:
        """Hex sha256 of the colours as little-endian float32 in C order: the palette's identity."""
        return sha256(self.colours.tobytes()).hexdigest()

    @classmethod
    def load(cls, path: Path) -> "Palette":
        """Read a palette from an .npy file, or from a model: the "clusters" of its preprocessor_config.json.

        Args:
            path: of a file of either kind, or of the folder that holds one: a run, a model, one of the hub's (hf://...).
        """
        path = hub.local(Path(path), CLUSTERS)
        if path.is_dir():
            path = next((path / name for name in ("palette.npy", CLUSTERS) if (path / name).exists()), path)
        try:
            colours = _clusters(path) if path.suffix == ".json" else read_npy(path, _MOST_BYTES, fortran=True)
        except FileNotFoundError:
            raise UserError(f"{path}: no such palette: make one with igpt-data palette") from None
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: not a readable {path.suffix} palette: make one with igpt-data palette") from error
        try:
            return cls(colours)
        except UserError as error:
            raise UserError(f"{path}: {'clusters: ' if path.suffix == '.json' else ''}{error}") from None

    def save(self, path: Path) -> None:
        """Publish the colours as an .npy file, whole or not at all."""
        with publish_file(Path(path)) as file:
            np.lib.format.write_array(file, self.colours, version=(1, 0), allow_pickle=False)

    def encode(self, rgb: np.ndarray) -> np.ndarray:
        """Tokens of colours: uint8 [..., 3] -> uint16 [...], the index of each colour's nearest entry."""
        if rgb.dtype != np.uint8 or rgb.shape[-1:] != (3,):
            raise ValueError(f"expected uint8 [..., 3], got {rgb.dtype} {list(rgb.shape)}")
        index = rgb[..., 0].astype(np.int32)
        for channel in (1, 2):
            index <<= 8
            index |= rgb[..., channel]
        return self._table[index]

    def squared_error(self, rgb: np.ndarray, tokens: np.ndarray) -> float:
        """What `encode` lost: squared distances of the pixels to their tokens' colours, in [-1, 1] units, summed."""
        apart = rgb.reshape(-1, 3) / np.float32(127.5) - 1 - self.colours[tokens.reshape(-1)]
        return float(np.square(apart).sum(dtype=np.float64))

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        """Colours of tokens: integers [...] -> uint8 [..., 3], rint((c + 1) * 127.5).

        Raises:
            UserError: a token is outside [0, k).
        """
        tokens = np.asarray(tokens)
        if tokens.size and (tokens.min() < 0 or tokens.max() >= self.k):
            raise UserError(
                f"tokens from {tokens.min()} to {tokens.max()} do not fit the palette of {self.k} colours: "
                "use the palette that they were made with"
            )
        return np.rint((self.colours + 1.0) * 127.5).astype(np.uint8)[tokens]

    @cached_property
    def _table(self) -> np.ndarray:
        """Token of every colour, uint16 [2^24] at r << 16 | g << 8 | b, from the cache where it is there."""
        path = _cache_directory() / f"table-1-{self.sha256}.npy"
        try:
            table = read_npy(path, 2 * _LEVELS**3 + 4096)
            if table.dtype == np.uint16 and table.shape == (_LEVELS**3,) and int(table.max()) < self.k:
                return table
        except (OSError, ValueError):
            pass
        table = nearest_table(self.colours)
        try:
            with publish_file(path) as file:
                np.lib.format.write_array(file, table, version=(1, 0), allow_pickle=False)
        except (UserError, OSError):
            pass  # A cache that cannot be written costs a second or two, not the job.
        return table


def _clusters(path: Path) -> np.ndarray:
    """The colours in a model's preprocessor_config.json: float32 [k, 3]."""
    content = parse_json(read_regular(path, _MOST_BYTES))
    clusters = content.get("clusters") if isinstance(content, dict) else None
    try:
        if clusters is None:
            raise TypeError
        return np.array(clusters, np.float32)
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"{path}: its clusters are no table of colours: get it anew") from None


def nearest_table(colours: np.ndarray) -> np.ndarray:
    """Index of the nearest entry for all 2^24 colours, exact in float64, lowest index on ties.

    The colour cube is cut into blocks of 8 x 8 x 8. Within a block only those entries can win whose smallest
    distance to the block does not exceed the smallest of all entries' largest distances. The bounds are sums
    of the very terms that the distances are sums of, and rounding is monotone, so pruning loses no winner.

    Args:
        colours: float32 [k, 3] in [-1, 1].

    Returns:
        uint16 [2^24] at index r << 16 | g << 8 | b.
    """
    levels = np.arange(_LEVELS) / 127.5 - 1.0
    # [3, k, blocks, side]: squared distance along one channel.
    squares = (levels - colours.astype(np.float64).T[:, :, None]) ** 2
    squares = squares.reshape(3, len(colours), _BLOCKS, _SIDE)
    low, high = squares.min(3), squares.max(3)
    ends = squares[..., [0, -1]]
    table = np.empty((_BLOCKS, _SIDE, _BLOCKS, _SIDE, _BLOCKS, _SIDE), np.uint16)
    for r in range(_BLOCKS):
        for g in range(_BLOCKS):
            # Added in the order (r + g) + b, as the distances are, for the bounds to hold to the last bit.
            low_kb = (low[0, :, r] + low[1, :, g])[:, None] + low[2]
            high_kb = (high[0, :, r] + high[1, :, g])[:, None] + high[2]
            possible = low_kb <= high_kb.min(0)
            for b in range(_BLOCKS):
                entries = np.flatnonzero(possible[:, b])
                if len(entries) > _MANY:
                    near = entries[np.argmin(low_kb[entries, b] + high_kb[entries, b])]
                    gap = np.zeros(len(entries))
                    for channel, block in enumerate((r, g, b)):
                        gap += (ends[channel, entries, block] - ends[channel, near, block]).min(-1)
                    entries = entries[gap <= _SLACK]
                if len(entries) == 1:
                    table[r, :, g, :, b, :] = entries[0]
                    continue
                plane = squares[0, entries, r].T[:, None, :] + squares[1, entries, g].T
                distances = plane[:, :, None, :] + squares[2, entries, b].T
                table[r, :, g, :, b, :] = entries[distances.argmin(3)]
    return table.reshape(-1)


def _cache_directory() -> Path:
    # By the XDG rules a relative path there counts as unset.
    root = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (root if root.is_absolute() else Path.home() / ".cache") / "igpt-ds"
