"""Features on the disk: RUN/features/NAME-KEY/, computed once for (checkpoint, data, layers, masks, precision, type).

    features.npy    float32 or float16 [L, images, D], read through a memory map
    labels.npy      int64 [images]
    record.json     the facts that KEY is a hash of: the directory's commit mark, published with a rename

A directory whose record is not what its key stands for was moved or mixed up, and is refused; features of another
checkpoint have another key and are never taken.
"""

import hashlib
import json
import math
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from igpt_ds.atomic import fsync_directory, publish_directory, publish_text, unfinished, writing
from igpt_ds.config.schema import Config, identity
from igpt_ds.dataset.npy import read_npy
from igpt_ds.dataset.shards import Dataset
from igpt_ds.errors import UserError
from igpt_ds.features.extract import Network, extract
from igpt_ds.loading.loader import source_rows
from igpt_ds.reading import MOST_BYTES, read_json
from igpt_ds.weights.base import Weights

FORMAT = 2


@dataclass(frozen=True)
class Features:
    """Features and labels of a dataset's images.

    Attributes:
        numbers: which layers, ascending.
        layers: float32 or float16 [len(numbers), images, D], as a rule a memory map.
        labels: int64 [images].
    """

    numbers: tuple[int, ...]
    layers: np.ndarray
    labels: np.ndarray

    def of(self, layer: int) -> np.ndarray:
        """The features of one layer: [images, D]."""
        return self.layers[self.numbers.index(layer)]


def fingerprint(config: Config, checkpoint: Weights | None) -> str:
    """Tells networks apart: a hash of the weights' files, or of what an untrained network is drawn from."""
    facts: dict[str, Any] = {"model": identity(config)["model"], "objective": asdict(config.objective)}
    facts |= {"files": checkpoint.files} if checkpoint else {"untrained": config.seed}
    return _sha256(facts)


def facts_of(network: Network, dataset: Dataset, images: int, mask_seed: int | None) -> dict[str, Any]:
    """What decides the features, as JSON; all of it but the layers must agree for a cache to be used."""
    recipe = asdict(network.recipe)
    return {
        "format": FORMAT,
        "checkpoint": fingerprint(network.config, network.checkpoint),
        "step": network.checkpoint.step if network.checkpoint else None,
        "data": _sha256([asdict(source_rows(dataset)), dataset.palette.sha256, dataset.manifest.classes]),
        "split": dataset.manifest.split,
        "images": images,
        "mask_seed": mask_seed,
        **recipe,
        "layers": list(recipe["layers"]),
    }


def cached(
    network: Network,
    dataset: Dataset,
    folder: Path,
    title: str,
    images: int | None = None,
    mask_seed: int | None = None,
) -> Features:
    """The features of the dataset's (first) images: from `folder` if they are there, else computed and left there.

    A collective of all ranks, each of which gets them: they must see the same folder. Features of more layers serve,
    too.

    Raises:
        RunError: a feature is not finite.
    """
    total, ranks = min(dataset.rows, images or dataset.rows), network.ranks
    facts = facts_of(network, dataset, total, mask_seed)
    path = ranks.from_rank_0(_find(folder, facts) if ranks.rank == 0 else None)
    if path is None and ranks.rank:
        extract(network, dataset, title, total, mask_seed, None)
    elif path is None:
        path = _make(network, dataset, folder / _name(facts), title, facts, mask_seed)
    path = ranks.from_rank_0(path)
    assert path is not None
    if not path.exists():
        raise UserError(f"{path}: rank {ranks.rank} does not see it: keep the run where all nodes see it")
    return _open(path, network.recipe.layers)


def _make(
    network: Network, dataset: Dataset, final: Path, title: str, facts: dict[str, Any], mask_seed: int | None
) -> Path:
    """Compute features and publish them as `final`, which is returned; rank 0's part."""
    temporary, total = unfinished(final), facts["images"]
    shape = (len(facts["layers"]), total, network.config.model.width)
    try:
        with writing(temporary):
            temporary.mkdir(parents=True)
            out_LID = _allocate(temporary / "features.npy", shape, np.dtype(facts["store"]))
            np.save(temporary / "labels.npy", dataset.labels()[:total], allow_pickle=False)
        extract(network, dataset, title, total, mask_seed, out_LID)
        out_LID.flush()
        del out_LID
        publish_text(temporary / "record.json", json.dumps(facts, indent=2) + "\n")
        fsync_directory(temporary)
        publish_directory(temporary, final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def _allocate(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> np.memmap:
    """A memory map whose space on the disk is there: a disk that fills up later would kill the process."""
    size = dtype.itemsize * math.prod(shape)
    free = shutil.disk_usage(path.parent).free
    if size > free:
        raise UserError(
            f"{path.parent.parent}: {size / 2**30:.3g} GiB of features, but {free / 2**30:.3g} GiB are free: "
            f"free space, or ask for {'--store float16, ' if dtype.itemsize > 2 else ''}fewer --layers or --images"
        )
    array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    with open(path, "r+b") as file:
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


def _find(folder: Path, facts: dict[str, Any]) -> Path | None:
    """A cache with these facts and at least these layers."""
    exact = folder / _name(facts)
    if exact.exists() and (record := _record(exact)) != facts:
        whose = "no record" if record is None else f"a record of step {record.get('step')}"
        raise UserError(
            f"{exact}: features of another checkpoint, data or layers than its name says ({whose}): delete it"
        )
    wanted = set(facts["layers"])
    for path in [exact, *sorted(folder.glob("[!.]*"))]:
        record = _record(path)
        # A foreign directory is no fault of this evaluation, and is not used.
        if (
            record is not None
            and {**record, "layers": None} == {**facts, "layers": None}
            and wanted <= set(record["layers"])
            and path.name == _name(record)
        ):
            return path
    return None


def _record(path: Path) -> dict[str, Any] | None:
    try:
        record = read_json(path / "record.json")
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("layers"), list) else None


def _name(facts: dict[str, Any]) -> str:
    step = "untrained" if facts["step"] is None else f"step-{facts['step']:08d}"
    return f"{step}-{facts['split']}-{_sha256(facts)[:16]}"


def _open(path: Path, layers: tuple[int, ...]) -> Features:
    record = _record(path)
    try:
        stored = np.load(path / "features.npy", mmap_mode="r", allow_pickle=False)
        labels = read_npy(path / "labels.npy", MOST_BYTES)
        assert record is not None
        fits = stored.dtype == record["store"] and stored.shape[:2] == (len(record["layers"]), record["images"])
        if not fits or labels.dtype != np.int64 or labels.shape != (record["images"],):
            raise ValueError("arrays of another shape than recorded")
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path}: damaged features ({error}): delete it") from error
    order = [record["layers"].index(layer) for layer in layers]
    # A slice is a view of the map; picked layers would be copied into memory.
    span = slice(order[0], order[-1] + 1)
    if order == list(range(span.start, span.stop)):
        return Features(layers, stored[span], labels)
    return Features(tuple(record["layers"]), stored, labels)


def _sha256(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
