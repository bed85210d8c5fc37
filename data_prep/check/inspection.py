"""What is in a dataset directory: figures for people and for programs, and three pictures.

Figures of the manifest and labels are exact. Tokens are looked at in a sample, so that 100 million images answer in
seconds: stretches of 16 neighbouring rows, spread evenly over the images of view 0, each at a place within its share
that a generator of fixed seed draws. A dataset that is no larger than the sample is read whole.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from igpt_ds.dataset.shards import Dataset
from igpt_ds.errors import UserError
from igpt_ds.reading import open_regular, parse_json

SAMPLE = 4096  # rows
_STRETCH = 16  # rows; one read each


@dataclass(frozen=True)
class Inspection:
    """What `inspect` has found.

    Attributes:
        dataset: the dataset.
        facts: as JSON; the keys are always the same.
        labels: of all images, int64 [rows], or None.
        counts: of each token in the sample, int64 [k].
    """

    dataset: Dataset
    facts: dict[str, Any]
    labels: np.ndarray | None
    counts: np.ndarray


def inspect(directory: Path, sample: int = SAMPLE) -> Inspection:
    """Look into a dataset.

    Args:
        sample: rows whose tokens are counted, about; no more than there are.
    """
    dataset = Dataset.open(directory)
    manifest = dataset.manifest
    labels = dataset.labels() if manifest.classes is not None else None
    classes = None
    if labels is not None and manifest.classes is not None:
        per_class = np.bincount(labels, minlength=len(manifest.classes)).tolist()
        classes = [{"name": name, "rows": rows} for name, rows in zip(manifest.classes, per_class, strict=True)]
    sampled, counts = 0, np.zeros(dataset.palette.k, np.int64)
    for tokens in _sampled(dataset, sample):
        sampled += len(tokens)
        counts += np.bincount(tokens.reshape(-1), minlength=len(counts))
    share = counts[counts > 0] / counts.sum()
    entropy = float(-(share * np.log(share)).sum()) + 0.0  # never -0
    size = sum(shard.bytes for shard in manifest.shards)
    rows_of_all_views = dataset.rows * manifest.views
    facts = {
        "directory": str(directory),
        "source": manifest.source,
        "split": manifest.split,
        "rows": dataset.rows,
        "views": manifest.views,
        "resolution": manifest.resolution,
        "sequence_length": manifest.sequence_length,
        "storage": manifest.storage,
        "shards": len(manifest.shards),
        "rows_per_shard": {
            "smallest": min(shard.rows for shard in manifest.shards),
            "largest": max(shard.rows for shard in manifest.shards),
        },
        "bytes": size,
        "bytes_per_sample": round(size / rows_of_all_views, 2),
        "classes": classes,
        "palette": {"k": dataset.palette.k, "sha256": dataset.palette.sha256},
        "transform": manifest.transform,
        "seed": manifest.seed,
        "versions": manifest.versions,
        "rejected": manifest.rejected,
        "rejects": _rejects(dataset.path / "rejects.jsonl"),
        "tokens": {
            "rows_sampled": sampled,
            "rows": dataset.rows,
            "entropy_nats": round(entropy, 6),
            "entropy_bits": round(entropy / float(np.log(2)), 6),
            "most_used": int(counts.argmax()),
            "most_used_share": round(float(counts.max() / counts.sum()), 6),
            "unused": int((counts == 0).sum()),
        },
    }
    return Inspection(dataset, facts, labels, counts)


def images_at(dataset: Dataset, images: np.ndarray) -> np.ndarray:
    """Tokens of images of view 0 by their indices: int64 [m] -> uint16 [m, n]."""
    shards, starts = _first_view(dataset)
    k = np.searchsorted(starts, images, "right") - 1
    return dataset.read_many(np.stack([shards[k], images - starts[k]], axis=1))


def spread(rows: int, stretches: int, length: int) -> list[tuple[int, int]]:
    """So many stretches (first, stop) of `length` of the rows, or a little shorter, spread evenly, none twice."""
    edges = np.arange(stretches + 1) * rows // stretches
    room = np.maximum(np.diff(edges) - length, 0)
    first = edges[:-1] + (np.random.default_rng(0).random(stretches) * (room + 1)).astype(np.int64)
    return list(zip(first.tolist(), np.minimum(first + length, edges[1:]).tolist(), strict=True))


def _sampled(dataset: Dataset, sample: int) -> Iterator[np.ndarray]:
    """Tokens of the sampled rows, a piece at a time: uint16 [some, n]."""
    shards, starts = _first_view(dataset)
    count = max(1, sample // _STRETCH)
    stretches = [(0, dataset.rows)] if sample >= dataset.rows else spread(dataset.rows, count, -(-sample // count))
    for first, stop in stretches:
        row = first
        while row < stop:
            k = int(np.searchsorted(starts, row, "right")) - 1
            end = min(stop, int(starts[k + 1]), row + dataset.manifest.rows_per_block)
            yield dataset.span(int(shards[k]), int(row - starts[k]), int(end - starts[k]))
            row = end


def _first_view(dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Shards of view 0, and the image that each begins with, and the end: int64 [shards], int64 [shards + 1]."""
    chosen = [(number, shard.rows) for number, shard in enumerate(dataset.manifest.shards) if shard.view == 0]
    shards, rows = np.array(chosen, np.int64).T
    return shards, np.concatenate([[0], rows.cumsum()])


def _rejects(path: Path) -> dict[str, int]:
    """Rejected images by reason, most frequent first; the build writes one line an image, where there are any."""
    counts: Counter[str] = Counter()
    try:
        with open_regular(path) as lines:
            counts.update(str(parse_json(line)["reason"]) for line in lines)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not readable, a line is no record of a reject: remove or restore it") from error
    return dict(sorted(counts.items(), key=lambda each: (-each[1], each[0])))
