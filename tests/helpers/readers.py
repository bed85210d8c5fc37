"""Readers of files that others may have written, with good files to read: what tests/test_fuzz.py mutates.

The files are small, and made by what writes such files, or by the standard library.
"""

import dataclasses
import importlib.util
import io
import json
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from igpt_ds.errors import UserError

ROOT = Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True)
class Reader:
    """A folder of good files, how they are read, and which are mutated.

    Attributes:
        read: of the folder; raises AssertionError where what was read cannot be right.
        files: their names in the folder.
        sign: records the checksum of a file, of which it is told the name, anew.
    """

    folder: Path
    read: Callable[[Path], object]
    files: list[str]
    sign: Callable[[Path, str], None] | None = None


def dataset(folder: Path) -> Reader:
    from data_prep.check.inspection import inspect
    from igpt_ds.atomic import sha256_file
    from igpt_ds.dataset.manifest import Manifest
    from igpt_ds.dataset.palette import Palette
    from igpt_ds.dataset.shards import Dataset, write_shard

    rng = np.random.default_rng(0)
    palette = Palette(rng.uniform(-1, 1, (8, 3)).astype(np.float32))
    palette.save(folder / "palette.npy")
    tokens = rng.integers(0, 8, (10, 16)).astype(np.uint16)
    ids = [f"cat/{i}.png" for i in range(10)]
    shard = write_shard(folder, "train-00000", tokens, ids, np.arange(10) % 3, rows_per_block=4, view=0)
    facts = {"k": 8, "sha256": palette.sha256, "distortion": 0.1}
    transform = {"crop": "none", "resolution": 4}
    Manifest(
        10, 16, 4, 4, "uint16", facts, "made", "train", 1, transform, 0, ["a", "b", "c"], {"numpy": "2"}, 0, [shard]
    ).save(folder)

    def read(folder: Path) -> None:
        found = Dataset.open(folder)
        images, labels, ids = found.images(), found.labels(), found.ids()
        assert images.shape == (found.rows, found.sequence_length) and images.max() < found.palette.k
        assert labels.shape == ids.shape == (found.rows,)
        assert labels.min() >= 0 and labels.max() < len(found.manifest.classes or ())
        json.dumps(inspect(folder).facts, allow_nan=False)

    def sign(folder: Path, name: str) -> None:
        if name.endswith(".tar"):
            path = folder / "manifest.json"
            tree = json.loads(path.read_text())
            tree["shards"][0] |= {"bytes": (folder / name).stat().st_size, "sha256": sha256_file(folder / name)}
            path.write_text(json.dumps(tree))

    return Reader(folder, read, ["manifest.json", "palette.npy", "train-00000.tar"], sign)


def checkpoint(folder: Path) -> Reader:
    from igpt_ds.atomic import sha256_file
    from igpt_ds.checkpoint.names import content_sha256
    from igpt_ds.checkpoint.read import Checkpoint
    from tests.helpers.checkpoints import FACTS, one_rank, save, shards_of

    path = save(folder / "made", 5, shards_of(0, 1), FACTS, 0, 1, one_rank)
    path.rename(folder / "step-00000005")

    def read(folder: Path) -> None:
        found = Checkpoint.open(folder / "step-00000005")
        found.verify()
        for name, values in found.weights().items():
            assert list(values.shape) == list(found.tensors[name]["shape"])

    def sign(folder: Path, name: str) -> None:
        path = folder / "step-00000005" / "checkpoint.json"
        tree = json.loads(path.read_text())
        if name.endswith(".safetensors"):
            tree["files"]["rank-00000.safetensors"] = {
                "bytes": (folder / name).stat().st_size,
                "sha256": sha256_file(folder / name),
            }
        tree.pop("sha256", None)
        path.write_text(json.dumps({"sha256": content_sha256(tree), **tree}))

    files = ["step-00000005/checkpoint.json", "step-00000005/rank-00000.safetensors"]
    return Reader(folder, read, files, sign)


def weights(folder: Path) -> list[Reader]:
    import torch
    from safetensors.torch import load_file

    from igpt_ds.atomic import sha256_file
    from igpt_ds.dataset.palette import Palette
    from igpt_ds.weights.base import config_of, palette_of, whole
    from igpt_ds.weights.formats import open_weights, written
    from tests.helpers.models import random_model, save_model, small_config

    config = small_config()
    palette = Palette(np.linspace(-1, 1, 24, dtype=np.float32).reshape(8, 3))
    save_model(random_model(config), config, folder / "run", palette.sha256)
    palette.save(folder / "run" / "palette.npy")
    source = open_weights(next((folder / "run" / "checkpoints").glob("step-*")))
    for name, place in (("hf", "hf"), ("safetensors", "single"), ("npz", "npz/weights.npz")):
        form = written(name)
        out = folder / place
        (out if form.FOLDER else out.parent).mkdir()
        form.write(source, palette, out, "float32", lambda count: None, 5 * 10**9)
    shutil.copytree(folder / "hf", folder / "bin")
    torch.save(load_file(folder / "bin" / "model.safetensors"), folder / "bin" / "pytorch_model.bin")
    (folder / "bin" / "model.safetensors").unlink()

    def read(folder: Path) -> None:
        npz = folder / "weights.npz"
        found = open_weights(npz if npz.exists() else folder)
        known, colours = config_of(found), palette_of(found)
        assert colours is None or colours.k == known.palette_size
        for name, facts in found.tensors.items():
            assert list(whole(found, name).shape) == list(facts["shape"])

    def sign(folder: Path, name: str) -> None:
        if name.endswith(".safetensors"):
            path = folder / "config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | {"sha256": sha256_file(folder / name)}))

    made = {"hf": ["config.json", "model.safetensors", "preprocessor_config.json"], "npz": ["weights.npz"]}
    made |= {"single": [path.name for path in (folder / "single").iterdir()], "bin": ["pytorch_model.bin"]}
    return [Reader(folder / place, read, files, sign if place == "single" else None) for place, files in made.items()]


def run_records(folder: Path) -> list[Reader]:
    from igpt_ds import evals
    from igpt_ds.results import figures, paper_figures, paper_tables
    from igpt_ds.results.records import read_run
    from igpt_ds.results.report import page
    from igpt_ds.run.directory import Run
    from igpt_ds.run.metrics import read_metrics
    from igpt_ds.train.machine import Asked, read_kept, settle
    from tests.helpers import machines, records

    run = records.make_run(folder / "search" / "run")
    several = [{"layers": [0, 1], "accuracy": 0.9, "n": 60, "test": {"accuracy": 0.9, "n": 320}}]
    tested = {"accuracy": 0.8, "n": 320, "layers": [1], "masks": records.masks(0.8)}
    facts = {"concatenation": several, "masks": records.masks(0.9), "test": tested}
    records.write(run / "probe.json", records.probe(600, 0.5, 0.875, 0.75, **facts))
    records.write(run / "low_data.json", records.LOW_DATA)
    records.write(run / "eval.json", records.likelihood())
    records.write(run / "result.json", {"kind": "finetune", "accuracy": 0.9375, "n": 64, "split": "test"})
    rates = [{"rate": 0.01, "status": "diverged"}, {"rate": 0.003, "status": "done", "val_loss": 1.5, "n": 60}]
    records.write(run.parent / "sweep.json", {"rates": rates, "winner": 0.003})
    event = {"step": 300, "event": "rollback", "reason": "spike", "left_out": [200, 250]}
    validation = {"step": 600, "val_loss": 1.25, "val_images": 60}
    records.write_metrics(run, records.training_line(100, 2.0), event, records.training_line(600, 1.2), validation)
    decided = {
        "values": {"micro_batch": 4, "ds": "zero3"},
        "machine": {"name": "CPU", "ranks": 1, "ranks_per_node": 1, "memory_gib": 16},
    }
    ds = json.loads((ROOT / "ds_configs" / "zero3.json").read_text())
    (run / "ds.json").write_text(json.dumps({**ds, "decided": decided}))
    drawn = 0

    def tables(folder: Path) -> None:
        nonlocal drawn
        found = read_run(folder / "run")
        texts = [table.text() + table.markdown() + table.csv() for table in paper_tables.all_tables([found])]
        for name, by_file in found.evaluations.items():
            texts += [evals.load(name).table(record).text() for record in by_file.values()]
        assert not re.search(r"\bnan\b|\binf\b|\d{40}", "".join(texts).replace("nan at", ""))
        drawn += 1
        if drawn % 100 == 0:  # a page takes a second
            for draw in (paper_figures.figure_2, paper_figures.figure_3, paper_figures.figure_4):
                draw([found]).savefig(io.BytesIO())
            page(found)

    def course(folder: Path) -> None:
        nonlocal drawn
        lines = read_metrics(folder / "run" / "metrics.jsonl", lambda text: None)
        assert all(type(line["step"]) is int for line in lines)
        found = read_run(folder / "run")
        paper_tables.table_5([found])
        drawn += 1
        if drawn % 25 == 0:
            figures.losses(found.metrics).savefig(io.BytesIO())
            figures.course(found.metrics, "grad_norm", "", "", log=True).savefig(io.BytesIO())

    def settings(folder: Path) -> None:
        settle(Asked(read_run(folder / "run").config, None, read_kept(Run(folder / "run"))), machines.CPU)

    written = ["run/probe.json", "run/low_data.json", "run/eval.json", "run/result.json", "sweep.json"]
    return [
        Reader(run.parent, tables, written),
        Reader(run.parent, course, ["run/metrics.jsonl"]),
        Reader(run.parent, settings, ["run/config.toml", "run/ds.json"]),
    ]


def selection(folder: Path) -> Reader:
    from data_prep.selection.file import Selection, write_selection

    parts = [("a.tar", np.array([b"a/1", b"a/2"])), ("b.tar", np.array([b"b/1"]))]
    write_selection(folder / "s.npz", "webdataset", iter(parts), inputs=5, dropped={"near": 2}, settings={"seed": 0})

    def read(folder: Path) -> None:
        found = Selection.open(folder / "s.npz")
        assert found.images == sum(len(found.kept(part)) for part in found.parts)
        assert found.inputs == found.images + sum(found.dropped.values())

    return Reader(folder, read, ["s.npz"])


def sources(folder: Path) -> list[Reader]:
    from data_prep.sources import open_source
    from tests.data_prep.sources.test_cifar import cifar10_files
    from tests.helpers.source_fixtures import everything, link, png, tar_bytes

    def read(name: str, **options: str) -> Callable[[Path], None]:
        def call(folder: Path) -> None:
            source: Any = open_source(name, [str(folder)], {k: v.format(folder) for k, v in options.items()})
            if hasattr(source, "parts"):
                found = [(each.item, each.data) for each in everything(source)]
            else:
                found = [(item, source.read(item.id)) for item in source.items("train")]
            for item, data in found:
                assert isinstance(data, bytes | OSError) and "\0" not in item.id
                assert item.label is None or 0 <= item.label < len(source.classes)

        return call

    found = []
    if importlib.util.find_spec("pyarrow"):
        from tests.data_prep.sources.test_parquet import simple

        simple(folder / "parquet" / "train.parquet", [1, 2, 3, 4, 5])
        found.append(Reader(folder / "parquet", read("parquet"), ["train.parquet"]))
    (folder / "tar").mkdir()
    long = "d/" * 60 + "long.png"
    members = [(f"{name}.{kind}", data) for name in "ab" for kind, data in (("png", png(1)), ("cls", b"1"))]
    (folder / "tar" / "a.tar").write_bytes(tar_bytes([*members, (long, png(2)), (link("x.png", "a.png"), b"")]))
    (folder / "tar" / "b.tar").write_bytes(tar_bytes([(long, png(2)), ("é.png", png(3))], kind=2))
    (folder / "tar" / "classes.txt").write_text("cat\ndog\n")
    (folder / "cifar").mkdir()
    for name, data in cifar10_files(False, lambda value: pickle.dumps(value, 2)).items():
        (folder / "cifar" / name).write_bytes(data)
    (folder / "cifar" / "batches.meta").write_bytes(pickle.dumps({"label_names": ["a", "b", "c"]}, 2))
    return [
        *found,
        Reader(folder / "tar", read("webdataset"), ["a.tar", "b.tar"]),
        Reader(folder / "tar", read("webdataset", classes="{}/classes.txt"), ["a.tar", "classes.txt"]),
        Reader(folder / "cifar", read("cifar10"), ["data_batch_1", "batches.meta"]),
    ]


def marks(folder: Path) -> Reader:
    """What answers None, or is passed over, where it is damaged."""
    from igpt_ds import lock
    from igpt_ds.dataset.manifest import ShardRecord
    from igpt_ds.dataset.shards import read_mark, write_shard

    write_shard(folder, "s", np.zeros((3, 4), np.uint16), ["a", "b", "c"], None, rows_per_block=2, view=0)
    owner = lock.Owner("host", "machine", folder.stat().st_ino, 7, 9, "today", "0" * 16)
    (folder / lock.NAME).write_text(json.dumps(dataclasses.asdict(owner)))

    def read(folder: Path) -> None:
        found, mark = lock.read(folder / lock.NAME), read_mark(folder, "s")
        if found is None or mark is None:
            raise UserError("marks: damaged: passed over")
        assert isinstance(found, lock.Owner) and isinstance(mark[0], ShardRecord)

    return Reader(folder, read, [lock.NAME, "s.json"])


def readers(root: Path) -> list[Reader]:
    def fresh(name: str) -> Path:
        (root / name).mkdir()
        return root / name

    return [
        dataset(fresh("dataset")),
        checkpoint(fresh("checkpoint")),
        *weights(fresh("weights")),
        *run_records(fresh("runs")),
        marks(fresh("marks")),
        selection(fresh("selection")),
        *sources(fresh("sources")),
    ]
