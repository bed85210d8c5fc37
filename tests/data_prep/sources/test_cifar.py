"""cifar10 and cifar100: every name, count, label and pixel of fixtures in all published layouts."""

import gzip
import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_prep.files.unpickle import unpickle
from igpt_ds.errors import UserError
from tests.helpers.source_fixtures import decoded, listed, refusal, tar_bytes

NAMES = ["airplane", "automobile", "bird"]
FINE, COARSE = [f"fine {i}" for i in range(6)], ["water", "land"]
ROWS = 4


def python2_pickle(value: object) -> bytes:
    """A pickle as Python 2 and NumPy 1 wrote CIFAR's: text as bytes, and arrays rebuilt by numpy.core."""

    def written(part: object) -> bytes:
        if isinstance(part, dict):
            return b"(" + b"".join(written(key) + written(each) for key, each in part.items()) + b"d"
        if isinstance(part, list):
            return b"(" + b"".join(map(written, part)) + b"l"
        if isinstance(part, int):
            return b"J" + part.to_bytes(4, "little")
        if isinstance(part, np.ndarray):
            made = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR"
            shape = b"(" + b"".join(map(written, part.shape)) + b"t"
            dtype = b"cnumpy\ndtype\n(S'u1'\nI0\nI1\ntR(I3\nS'|'\nNNNI-1\nI-1\nI0\ntb"
            return made + b"(I1\n" + shape + dtype + b"I00\n" + written(part.tobytes()) + b"tb"
        raw = part if isinstance(part, bytes) else str(part).encode()
        return b"T" + len(raw).to_bytes(4, "little") + raw

    return b"\x80\x02" + written(value) + b"."


def rows(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (ROWS, 3072), dtype=np.uint8)


def labels(seed: int, count: int) -> list[int]:
    return np.random.default_rng(100 + seed).integers(0, count, ROWS).tolist()


def cifar10_files(binary: bool, dump: Callable[[object], bytes]) -> dict[str, bytes]:
    files = {}
    for seed, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        if binary:
            table = np.column_stack([np.array(labels(seed, 3), np.uint8), rows(seed)])
            files[f"{name}.bin"] = table.tobytes()
        else:
            files[name] = dump(
                {"batch_label": "x", "labels": labels(seed, 3), "data": rows(seed), "filenames": ["a.png"]}
            )
    if binary:
        return {**files, "batches.meta.txt": "\n".join([*NAMES, "", ""]).encode(), "readme.html": b"<html>"}
    return {**files, "batches.meta": dump({"label_names": NAMES, "num_vis": 3072}), "readme.html": b"<html>"}


def cifar100_files(binary: bool, dump: Callable[[object], bytes]) -> dict[str, bytes]:
    files = {}
    for seed, name in enumerate(("train", "test")):
        coarse, fine = labels(seed + 50, 2), labels(seed, 6)
        if binary:
            head = np.array([coarse, fine], np.uint8).T
            files[f"{name}.bin"] = np.column_stack([head, rows(seed)]).tobytes()
        else:
            files[name] = dump({"coarse_labels": coarse, "fine_labels": fine, "data": rows(seed), "filenames": ["a"]})
    if binary:
        names = {"fine_label_names.txt": FINE, "coarse_label_names.txt": COARSE}
        return {**files, **{file: ("\n".join(text) + "\n").encode() for file, text in names.items()}}
    return {**files, "meta": dump({"fine_label_names": FINE, "coarse_label_names": COARSE})}


def python3_pickle(value: object) -> bytes:
    return pickle.dumps(value, protocol=3)


def python3_pickle_for_python2(value: object) -> bytes:
    return pickle.dumps(value, protocol=2)


DUMPS = {
    "binary": python3_pickle,
    "python2": python2_pickle,
    "3": python3_pickle,
    "3 for 2": python3_pickle_for_python2,
}


def test_the_fixture_is_what_python2_wrote() -> None:
    found = pickle.loads(python2_pickle({"labels": [1, 200], "data": rows(0)}), encoding="bytes")
    assert found[b"labels"] == [1, 200]
    assert np.array_equal(found[b"data"], rows(0))


def laid_out(files: dict[str, bytes], root: Path, how: str, folder: str, archive: str) -> Path:
    """The files as a folder, as the folder around it, as the .tar.gz, or as the folder around that."""
    if how.startswith("archive"):
        (root / archive).write_bytes(gzip.compress(tar_bytes([(f"{folder}/{n}", d) for n, d in files.items()]), 1))
        return root / archive if how == "archive" else root
    (root / folder).mkdir()
    for name, data in files.items():
        (root / folder / name).write_bytes(data)
    return root / folder if how == "folder" else root


HOW = ["folder", "folder around", "archive", "archive around"]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("layout", list(DUMPS))
def test_cifar10(layout: str, how: str, tmp_path: Path) -> None:
    files = cifar10_files(layout == "binary", DUMPS[layout])
    folder, archive = ("cifar-10-batches-bin", "cifar-10-binary.tar.gz")
    if layout != "binary":
        folder, archive = ("cifar-10-batches-py", "cifar-10-python.tar.gz")
    source = listed("cifar10", laid_out(files, tmp_path, how, folder, archive))
    assert (source.name, source.classes) == ("cifar10", NAMES)
    for pool, seeds in (("train", range(5)), ("test", range(5, 6))):
        items = source.items(pool)  # type: ignore[arg-type]
        assert [item.id for item in items] == [f"{pool}/{i:05d}" for i in range(len(seeds) * ROWS)]
        assert [item.label for item in items] == [label for seed in seeds for label in labels(seed, 3)]
        for item, row in zip(items, np.concatenate([rows(seed) for seed in seeds]), strict=True):
            found = decoded(source.read(item.id))
            for channel in range(3):  # row by row, as the publisher's page says
                assert np.array_equal(found[..., channel].ravel(), row[1024 * channel : 1024 * (channel + 1)])


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("layout", ["binary", "python2"])
def test_cifar100(layout: str, how: str, tmp_path: Path) -> None:
    files = cifar100_files(layout == "binary", python2_pickle)
    kind = "binary" if layout == "binary" else "python"
    path = laid_out(files, tmp_path, how, f"cifar-100-{kind}", f"cifar-100-{kind}.tar.gz")
    for options, classes, shift in (({}, FINE, 0), ({"labels": "coarse"}, COARSE, 50), ({"labels": "fine"}, FINE, 0)):
        source = listed("cifar100", path, **options)
        assert (source.name, source.classes) == ("cifar100", classes)
        for seed, pool in enumerate(("train", "test")):
            items = source.items(pool)  # type: ignore[arg-type]
            assert [item.id for item in items] == [f"{pool}/{i:05d}" for i in range(ROWS)]
            assert [item.label for item in items] == labels(seed + shift, len(classes))
            for item, row in zip(items, rows(seed), strict=True):
                assert np.array_equal(decoded(source.read(item.id)), row.reshape(3, 32, 32).transpose(1, 2, 0))
    assert "choose fine or coarse" in refusal(lambda: listed("cifar100", path, labels="superclass"))


class Malicious:
    def __init__(self, call: object, *arguments: object) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return self.call, self.arguments


def test_a_pickle_that_runs_a_command_is_refused(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    command = f"touch {mark}"
    bad = pickle.dumps({"label_names": Malicious(os.system, command)})
    pickle.loads(bad)
    assert mark.exists(), "the fixture is not malicious"
    mark.unlink()
    files = cifar10_files(False, python2_pickle)
    for file in ("batches.meta", "data_batch_3"):
        root = tmp_path / file
        root.mkdir()
        content = pickle.dumps({"data": Malicious(os.system, command), "labels": []})
        path = laid_out({**files, file: content}, root, "folder", "cifar-10-batches-py", "")
        line = refusal(lambda path=path: listed("cifar10", path).items("train"))
        assert f"{path} {file}" in line
        assert "it calls posix.system" in line
    assert not mark.exists()


@pytest.mark.parametrize(
    "call",
    [
        (eval, "1"),
        (getattr, 1, "real"),
        (__import__, "os"),
        (np.frombuffer, b"abcd", "u1"),
        (np.load, "x.npy"),
        (bytes, 10**12),
        (bytearray, 10),
        (pickle.loads, b"N."),
        (io.open, "/etc/passwd"),
    ],
    ids=lambda call: call[0].__name__,
)
def test_a_pickle_calls_nothing(call: tuple[object, ...]) -> None:
    assert "it calls" in refusal(lambda: unpickle(pickle.dumps({"a": Malicious(*call)}), "f"))


def test_damaged_and_made_up_pickles_are_refused() -> None:
    whole = python2_pickle({"labels": [1, 2], "data": rows(0)})
    assert unpickle(whole, "f")[b"labels"] == [1, 2]
    for cut in (0, 1, 10, len(whole) // 2, len(whole) - 1):
        refusal(lambda cut=cut: unpickle(whole[:cut], "f"))
    refusal(lambda: unpickle(pickle.dumps([1]), "f"))
    memo_bomb = b"\x80\x02Nr\xff\xff\xff\x7f."  # index 2^31 - 1: a table of 16 GB in Python's reader in C
    assert "not a pickled dictionary" in refusal(lambda: unpickle(memo_bomb, "f"))
    length_bomb = b"\x80\x04\x8e" + (1 << 60).to_bytes(8, "little") + b"abc."
    refusal(lambda: unpickle(length_bomb, "f"))
    rng = np.random.default_rng(0)
    for _ in range(400):
        data = bytearray(whole[:600] + whole[-600:])
        for _ in range(3):
            data[int(rng.integers(0, len(data)))] = int(rng.integers(0, 256))
        try:
            unpickle(bytes(data), "f")
        except UserError as error:
            assert "\n" not in str(error)


NESTED = b"\x80\x02}(" + b"U\x01a" + b"\x85q\x00" + b"".join(b"h%ch%c\x86q%c" % (i, i, i + 1) for i in range(50))


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (NESTED + b"Nu.", "a key that is no text"),
        (NESTED + b"Nd.", "a key that is no text"),
        (NESTED + b"Ns.", "not a pickle"),
        (b"\x80\x02}" + b"U\x01a\x85Ns.", "a key that is no text"),
        (b"\x80\x05\x96" + (3 << 30).to_bytes(8, "little"), "operation 150"),
        (b"\x80\x05}\x97N.", "operation 151"),
        (b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f}.", None),
        (b"\x80\x02}X\x03\x00\x00\x00\xed\xa0\x80Ns.", "surrogates not allowed"),
        (b"\x80\x02" + b"N" * 4_000_001 + b".", "too many operations"),
        (b"\x80\x02c_codecs\nencode\n(X\x01\x00\x00\x00a}sb.", "not a pickle"),
        (b"\x80\x02cnumpy\ndtype\n(" + b"U\xff" + b"a" * 255 + b"tR.", "an array of what is no number"),
        (
            b"\x80\x02]q\x00c_codecs\nencode\nq\x01X\x64\x00\x00\x00" + b"a" * 100 + b"X\x06\x00\x00\x00latin1\x86q\x02"
            + b"h\x01h\x02R" * 50 + b".",
            "it repeats itself",
        ),
    ],
)  # fmt: skip
def test_small_pickles_that_ask_for_much(data: bytes, told: str | None) -> None:
    if told is None:
        assert unpickle(data, "f") == {}
    else:
        assert told in refusal(lambda: unpickle(data, "f"))


class Array:
    """Pickles as an array whose state is made up."""

    def __init__(self, shape: tuple[int, ...], kind: str, data: object) -> None:
        self.state = (1, shape, np.dtype(kind), False, data)

    def __reduce__(self) -> tuple[object, ...]:
        return np.ndarray.__reduce__(np.zeros(1, np.uint8))[0], (np.ndarray, (0,), b"b"), self.state  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("data", "numbers"),
    [
        (Array((4, 3072), "u1", b"short"), [0] * 4),
        (Array((-4, -3072), "u1", bytes(4 * 3072)), [0] * 4),
        (Array((2, 3072), "u2", bytes(4 * 3072)), [0] * 2),
        (Array((1, 3072), "O", [None] * 3072), [0]),
        (Array((4 * 3072,), "u1", bytes(4 * 3072)), [0] * 4),
        (rows(0), [0] * 3),
        (rows(0), [0, 0, 0, "x"]),
        (rows(0), [0, 0, 0, -1]),
        (rows(0), [0, 0, 0, 3]),
        ([1, 2], [0] * 4),
        (rows(0), np.zeros(4, np.int64)),
        (Array((1,) * 4 + (4, 3072), "u1", bytes(4 * 3072)), [0] * 4),
    ],
)
def test_arrays_that_do_not_fit_are_refused(data: object, numbers: object, tmp_path: Path) -> None:
    files = cifar10_files(False, python3_pickle)
    files["data_batch_2"] = python3_pickle({"data": data, "labels": numbers})
    path = laid_out(files, tmp_path, "folder", "cifar-10-batches-py", "")
    assert "fetch it again" in refusal(lambda: listed("cifar10", path).items("train"))
    assert len(listed("cifar10", path).items("test")) == ROWS


def test_other_faults_of_cifar(tmp_path: Path) -> None:
    path = laid_out(cifar10_files(True, python3_pickle), tmp_path, "folder", "cifar-10-batches-bin", "")
    assert "no such file or folder" in refusal(lambda: listed("cifar10", tmp_path / "none"))
    assert "2 paths" in refusal(lambda: listed("cifar10", path, path))
    names = path / "batches.meta.txt"
    names.write_bytes(b"\xef\xbb\xbf" + names.read_bytes().replace(b"\n", b"\r\n"))
    assert listed("cifar10", path).classes == NAMES
    assert "not cifar100" in refusal(lambda: listed("cifar100", path))
    with (path / "test_batch.bin").open("ab") as file:
        file.write(b"x")
    assert "no whole number of images" in refusal(lambda: listed("cifar10", path).items("test"))
    (path / "data_batch_4.bin").unlink()
    assert "data_batch_4.bin is missing" in refusal(lambda: listed("cifar10", path))
    cut = tmp_path / "cifar-10-binary.tar.gz"
    cut.write_bytes(gzip.compress(os.urandom(5000))[:-100])
    assert "cannot be unpacked" in refusal(lambda: listed("cifar10", cut))
    cut.unlink()
    os.mkfifo(cut)  # to open it would hang
    assert "not a regular file" in refusal(lambda: listed("cifar10", cut))
    cut.unlink()
    cut.write_bytes(gzip.compress(os.urandom(5000)))
    assert "not a tar" in refusal(lambda: listed("cifar10", cut))
