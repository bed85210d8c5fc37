"""parquet: columns found or chosen, splits by name, rows as they are, memory bounded by the row group."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.files import patterns, remote
from data_prep.sources import parquet
from data_prep.sources.parquet import split_of
from igpt_ds.errors import UserError
from tests.helpers.hub import hub as serve
from tests.helpers.source_fixtures import decoded, everything, png, random_pixels, reason, refusal, streamed

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

CLASSES = ["cat", "dog", "cow"]


def images(seeds: list[int]) -> Any:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    return pa.array([{"bytes": png(seed), "path": f"{seed}.png"} for seed in seeds], kind)


def hub(table: Any, **labels: list[str]) -> Any:
    """The table with its features described as Hugging Face does."""
    features: dict[str, object] = {"image": {"_type": "Image"}, "text": {"dtype": "string", "_type": "Value"}}
    features |= {column: {"names": names, "_type": "ClassLabel"} for column, names in labels.items()}
    return table.replace_schema_metadata({b"huggingface": json.dumps({"info": {"features": features}}).encode()})


def write(path: Path, columns: dict[str, Any], rows_per_group: int = 4, **labels: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({name: pa.array(c) if isinstance(c, list) else c for name, c in columns.items()})
    pq.write_table(hub(table, **labels) if labels else table, path, row_group_size=rows_per_group)


def simple(path: Path, seeds: list[int]) -> None:
    write(
        path, {"image": images(seeds), "label": [seed % 3 for seed in seeds], "text": ["t"] * len(seeds)}, label=CLASSES
    )


def test_the_layout_of_the_hub(tmp_path: Path) -> None:
    simple(tmp_path / "data/train-00000-of-00002.parquet", list(range(10)))
    simple(tmp_path / "data/train-00001-of-00002.parquet", list(range(10, 13)))
    simple(tmp_path / "data/validation-00000-of-00001.parquet", [50, 51])
    source = streamed("parquet", tmp_path)
    assert (source.name, source.classes) == ("parquet", CLASSES)
    names = [f"data/train-0000{i}-of-00002.parquet" for i in range(2)]
    assert source.parts("train") == names
    assert source.parts("test") == ["data/validation-00000-of-00001.parquet"]
    found = everything(source)
    ids = [f"{names[0]}/{i:08d}" for i in range(10)] + [f"{names[1]}/{i:08d}" for i in range(3)]
    assert [tuple(each.item) for each in found] == [(name, i % 3) for i, name in enumerate(ids)]
    for seed, each in enumerate(found):
        assert np.array_equal(decoded(each.data), random_pixels(seed))
    assert [each.item.label for each in everything(source, "test")] == [50 % 3, 51 % 3]
    one = streamed("parquet", tmp_path / names[1])
    assert [each.data for each in everything(one)] == [png(seed) for seed in (10, 11, 12)]


@pytest.mark.parametrize("features", [b"", b"[]", b'{"info":' * 100_000, b'{"info": {"features": {"label": 3}}}'])
def test_a_description_that_cannot_be_read_names_no_classes(tmp_path: Path, features: bytes) -> None:
    table = pa.table({"image": images([0, 1]), "label": pa.array([0, 1])})
    pq.write_table(table.replace_schema_metadata({b"huggingface": features}), tmp_path / "a.parquet")
    assert streamed("parquet", tmp_path).classes is None
    assert [each.item.label for each in everything(streamed("parquet", tmp_path))] == [None, None]


def test_splits_by_name(tmp_path: Path) -> None:
    expected = {
        "data/train-00000-of-00001.parquet": "train",
        "default/train/0000.parquet": "train",
        "default/validation/0000.parquet": "validation",
        "val.parquet": "validation",
        "dev_0.parquet": "validation",
        "cifar10/test/0000.parquet": "test",
        "test/train-0.parquet": "train",
        "0000.parquet": "train",
        "training.parquet": "train",
        "valley.parquet": "train",
        "testament/part.parquet": "train",
    }
    assert {name: split_of(name) for name in expected} == expected
    for split in ("train", "validation", "test"):
        simple(tmp_path / f"{split}-0.parquet", [1])
    assert streamed("parquet", tmp_path).parts("test") == ["test-0.parquet"]
    assert streamed("parquet", tmp_path, test="validation").parts("test") == ["validation-0.parquet"]
    assert streamed("parquet", tmp_path).parts("train") == ["train-0.parquet"]
    assert "choose test or validation" in refusal(lambda: streamed("parquet", tmp_path, test="val"))


@pytest.mark.parametrize(
    ("train", "test"),
    [
        (["plain_text/cifar10-train.parquet"], ["plain_text/cifar10-test.parquet"]),
        (["data/training-0.parquet"], ["data/Test-1.parquet", "data/evaluation-0.parquet", "data/testing-0.parquet"]),
        (["data/train-00000-of-00001.parquet"], ["data/eval-00000-of-00001.parquet"]),
        (
            ["my train file.parquet", "train1.parquet"],
            ["my_dataset-test.parquet", "my_test_file.parquet", "test1.parquet"],
        ),
        (["a/TRAIN/0.parquet"], ["a/VAL/0.parquet", "a/validation1.parquet"]),
        (["my_train/0.parquet", "trainset.parquet"], ["2-dev/0.parquet", "cifarVal.parquet"]),
        (["0.parquet", "contest.parquet", "latest/valley.parquet"], []),
    ],
)
def test_pools_by_names_as_on_the_hub(tmp_path: Path, train: list[str], test: list[str]) -> None:
    for name in (*train, *test):
        simple(tmp_path / name, [1])
    source = streamed("parquet", tmp_path)
    assert (source.parts("train"), source.parts("test")) == (train, test)
    every = sorted((*train, *test))
    for pool, other in (("train", "test"), ("test", "train")):
        told = streamed("parquet", tmp_path, pool=pool)
        assert (told.parts(pool), told.parts(other)) == (every, [])  # type: ignore[arg-type]


def test_names_that_do_not_tell_the_pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i, (first, second, told) in enumerate(
        [
            ("train-0.parquet", "extra-0.parquet", "extra-0.parquet: its name tells no split"),
            ("test/0.parquet", "0.parquet", "0.parquet: its name tells no split"),
            ("train-test.parquet", "0.parquet", "names both train and test"),
            ("test/train-0.parquet", "test/train-1.parquet", "is called train in a folder test"),
        ]
    ):
        root = tmp_path / str(i)
        simple(root / first, [1])
        simple(root / second, [2])
        for pool in ("train", "test"):
            assert told in refusal(lambda root=root, pool=pool: streamed("parquet", root).parts(pool))
        assert len(streamed("parquet", root, pool="train").parts("train")) == 2
        with pytest.raises(UserError, match="choose train or test"):
            streamed("parquet", root, pool="val")
    simple(tmp_path / "hub/test/0000.parquet", [1])
    given = streamed("parquet", tmp_path / "hub/test")
    assert (given.parts("train"), given.parts("test")) == ([], ["0000.parquet"])
    monkeypatch.chdir(tmp_path / "hub/test")
    for path in (".", "*.parquet", "0000.parquet"):
        assert (streamed("parquet", path).parts("train"), len(streamed("parquet", path).parts("test"))) == ([], 1)


def test_columns_of_views(tmp_path: Path) -> None:
    if not hasattr(pa, "binary_view"):
        pytest.skip("this pyarrow has no views")
    write(tmp_path / "x.parquet", {"img": pa.array([png(1), None], pa.binary_view()), "n": [1, 2]})
    first, second = everything(streamed("parquet", tmp_path))
    assert (first.data, reason(second)) == (png(1), "no image")


@pytest.mark.parametrize("names", [["cat", "cat"], ["cat", ""], "cat", {"0": "cat"}, [1, 2], None, []])
def test_class_labels_without_names(tmp_path: Path, names: Any) -> None:
    write(tmp_path / "x.parquet", {"image": images([1]), "label": [0]}, label=names)
    assert "has no class names" in refusal(lambda: streamed("parquet", tmp_path))
    assert streamed("parquet", tmp_path, label="none").classes is None


def test_a_dictionary_is_not_multiplied(tmp_path: Path) -> None:
    """64 rows of one value of 16 MB, and a page that packs as no images do."""
    table = pa.table({"image": pa.array([bytes(16 << 20)] * 64), "label": pa.array([0.5] * 64)})
    pq.write_table(table, tmp_path / "x.parquet", compression="zstd", dictionary_pagesize_limit=1 << 30)
    assert (tmp_path / "x.parquet").stat().st_size < 10_000
    source, before, highest = streamed("parquet", tmp_path), pa.total_allocated_bytes(), 0
    for found in source.stream("x.parquet"):
        assert len(found.data) == 16 << 20  # type: ignore[arg-type]
        highest = max(highest, pa.total_allocated_bytes() - before)
    assert highest < 100 << 20
    (tmp_path / "names").write_text("a\nb\n")
    told = refusal(lambda: streamed("parquet", tmp_path, label="label", classes=str(tmp_path / "names")))
    assert "holds no class numbers" in told


def test_images_that_pack_as_no_images_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "x.parquet", {"image": pa.array([bytes(1 << 20)] * 8, pa.large_binary()), "label": [0] * 8})
    source = streamed("parquet", tmp_path)
    assert len(everything(source)) == 8
    monkeypatch.setattr(parquet, "_LARGE", 1 << 20)
    monkeypatch.setattr(parquet, "_MOST_PACKED", 2)
    assert "pack so well" in refusal(lambda: everything(source))


def test_other_columns(tmp_path: Path) -> None:
    plain = pa.array([png(1), png(2)], pa.large_binary())
    write(tmp_path / "a/x.parquet", {"jpg": plain, "y": [1, 0], "name": ["p", "q"]})
    source = streamed("parquet", tmp_path / "a")
    assert source.classes is None
    assert [(each.item.label, each.data) for each in everything(source)] == [(None, png(1)), (None, png(2))]
    (tmp_path / "names").write_text("zero\none\n")
    source = streamed("parquet", tmp_path / "a", label="y", classes=str(tmp_path / "names"))
    assert source.classes == ["zero", "one"]
    assert [each.item.label for each in everything(source)] == [1, 0]
    for options, told in (
        ({"label": "y"}, "has no class names"),
        ({"label": "name"}, "holds no class numbers"),
        ({"label": "z"}, "holds no class numbers"),
        ({"classes": str(tmp_path / "names")}, "--option classes needs --option label"),
        ({"image": "name"}, "holds no images"),
        ({"image": "z"}, "holds no images"),
    ):
        assert told in refusal(lambda options=options: streamed("parquet", tmp_path / "a", **options))
    write(
        tmp_path / "b/x.parquet",
        {"one": images([1]), "two": images([2]), "fine": [0], "coarse": [1]},
        fine=CLASSES,
        coarse=["x", "y"],
    )
    assert "2 columns hold bytes" in refusal(lambda: streamed("parquet", tmp_path / "b", label="fine"))
    assert "choose one with --option label" in refusal(lambda: streamed("parquet", tmp_path / "b", image="one"))
    source = streamed("parquet", tmp_path / "b", image="two", label="coarse")
    assert (source.classes, [(e.item.label, e.data) for e in everything(source)]) == (["x", "y"], [(1, png(2))])
    source = streamed("parquet", tmp_path / "b", image="one", label="none")
    assert (source.classes, [(e.item.label, e.data) for e in everything(source)]) == (None, [(None, png(1))])
    for text, told in (("x\nz\n", "names z where the column coarse"), ("x\n", "none where"), ("x\ny\nz\n", "has none")):
        (tmp_path / "other").write_text(text)
        options = {"image": "one", "label": "coarse", "classes": str(tmp_path / "other")}
        assert told in refusal(lambda options=options: streamed("parquet", tmp_path / "b", **options))
    (tmp_path / "other").write_text("x\ny\n")
    assert streamed("parquet", tmp_path / "b", **options).classes == ["x", "y"]
    write(tmp_path / "c/x.parquet", {"text": ["no images"]})
    write(tmp_path / "d/x.parquet", {f"column {i}": ["no images"] for i in range(500)})
    assert len(refusal(lambda: streamed("parquet", tmp_path / "d"))) < 600
    assert "0 columns hold bytes" in refusal(lambda: streamed("parquet", tmp_path / "c"))


def test_rows_that_are_rejected(tmp_path: Path) -> None:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    given = [{"bytes": png(1)}, {"bytes": None, "path": "/etc/passwd"}, None, {"bytes": png(2)}, {"bytes": png(3)}]
    labels = [0, 1, 2, -1, None]
    write(
        tmp_path / "x.parquet", {"image": pa.array(given, kind), "label": pa.array(labels, pa.int64())}, label=CLASSES
    )
    found = everything(streamed("parquet", tmp_path))
    assert [reason(each) for each in found] == [None, "no image", "no image", "no valid class", "no valid class"]
    assert [each.item.id for each in found] == [f"x.parquet/{i:08d}" for i in range(5)]
    unlabelled = everything(streamed("parquet", tmp_path, label="none"))
    assert [reason(each) for each in unlabelled] == [None, "no image", "no image", None, None]


def test_files_that_do_not_agree(tmp_path: Path) -> None:
    simple(tmp_path / "0.parquet", [1])
    write(tmp_path / "1.parquet", {"image": images([1]), "label": [0], "text": [""]}, label=["dog", "cat", "cow"])
    source = streamed("parquet", tmp_path)
    assert "other columns or classes" in refusal(lambda: everything(source))


def test_damaged_files(tmp_path: Path) -> None:
    path = tmp_path / "0.parquet"
    simple(path, list(range(40)))
    source = streamed("parquet", tmp_path)
    whole = path.read_bytes()
    for cut in (0, 3, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        assert "not a whole Parquet file" in refusal(lambda: everything(source))
        assert "not a whole Parquet file" in refusal(lambda: streamed("parquet", tmp_path))
    path.write_bytes(b"<html>" * 100)
    assert "not a whole Parquet file" in refusal(lambda: streamed("parquet", tmp_path))
    assert "no .parquet files" in refusal(lambda: streamed("parquet", tmp_path / "*.none.parquet"))


def test_the_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    simple(tmp_path / "0.parquet", [1])
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    assert 'pip install "igpt-ds[parquet]"' in refusal(lambda: streamed("parquet", tmp_path))


def test_memory_is_that_of_a_row_group(tmp_path: Path) -> None:
    """Of 24 row groups of 8 MB each, a few are in memory at a time."""
    kind = pa.struct([("bytes", pa.binary())])
    schema = pa.schema([("image", kind)])
    with pq.ParquetWriter(tmp_path / "0.parquet", schema, compression="none") as writer:
        for group in range(24):
            rows = [{"bytes": np.random.default_rng([group, i]).bytes(1 << 18)} for i in range(32)]
            writer.write_table(pa.table({"image": pa.array(rows, kind)}, schema=schema))
    source = streamed("parquet", tmp_path)
    before, highest = pa.total_allocated_bytes(), 0
    count = 0
    for found in source.stream("0.parquet"):
        count += 1
        assert isinstance(found.data, bytes)
        assert len(found.data) == 1 << 18
        highest = max(highest, pa.total_allocated_bytes() - before)
    assert count == 24 * 32
    assert highest < 64 << 20


def test_remote_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec = pytest.importorskip("fsspec")
    simple(tmp_path / "train-0.parquet", [1, 2])
    monkeypatch.setattr(patterns, "PROTOCOLS", (*remote.PROTOCOLS, "memory"))
    store = fsspec.filesystem("memory")
    store.pipe("/hub/data/train-0.parquet", (tmp_path / "train-0.parquet").read_bytes())
    try:
        source = streamed("parquet", "memory://hub/data")
        assert source.classes == CLASSES
        assert everything(source) == everything(streamed("parquet", tmp_path))
    finally:
        store.rm("/hub", recursive=True)


def test_a_data_set_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hub" / "data").mkdir(parents=True)
    simple(tmp_path / "hub" / "data" / "train-00000-of-00001.parquet", [1, 2])
    simple(tmp_path / "hub" / "data" / "test-00000-of-00001.parquet", [0])
    with serve({"user/images": tmp_path / "hub"}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        source = streamed("parquet", "hf://datasets/user/images")
        assert source.classes == CLASSES
        assert everything(source) == everything(streamed("parquet", tmp_path / "hub"))
        with pytest.raises(UserError, match="hf://datasets/user/none"):
            streamed("parquet", "hf://datasets/user/none")
