"""The command igpt-data: what it writes and prints, and one line with status 2 for every bad input."""

import io
import os
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.cli import main
from data_prep.sources import names, open_source
from igpt_ds.dataset.palette import Palette
from igpt_ds.dataset.shards import Dataset
from igpt_ds.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
Capture = pytest.CaptureFixture[str]


def igpt_data(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "data_prep", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=cwd, env=environment, check=False)


def refused(*arguments: object) -> str:
    """Run with bad input: status 2, nothing on stdout, one line on stderr, which is returned."""
    result = igpt_data(*arguments)
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    assert result.stderr.startswith("igpt-data: ")
    assert result.stderr.count("\n") == 1, result.stderr
    return result.stderr


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 images of 8 x 8 in 5 greys, in two class folders, and a palette of 4 colours."""
    root = tmp_path_factory.mktemp("small")
    rng = np.random.default_rng(0)
    for i in range(24):
        folder = root / "images" / "xy"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((rng.integers(0, 5, (8, 8)) * 60).astype(np.uint8)).save(folder / f"{i}.png")
    Palette(np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3)).save(root / "palette.npy")
    return root


def shards(small: Path, out: Path, *more: object, images: Path | None = None) -> tuple[object, ...]:
    where = ("image_folder", images or small / "images", "--palette", small / "palette.npy", "--out", out)
    return ("shards", *where, "--resolution", 8, "--no-crop", "--holdout", 0.25, *more)


def test_palette_shards_verify(small: Path, tmp_path: Path) -> None:
    for where in (["image_folder", small / "images"], [small / "images"]):
        result = igpt_data("palette", *where, "--k", 5, "--no-crop", "--out", tmp_path / "palette.npy")
        assert result.returncode == 0, result.stderr
        assert result.stderr == ""
        fitted = Palette.load(tmp_path / "palette.npy")
        assert fitted.sha256 in result.stdout
        assert "5 of 5 unique" in result.stdout
        assert "0.00 levels of 255" in result.stdout
        assert fitted.decode(np.arange(5))[:, 0].tolist() == [0, 60, 120, 180, 240]
    arguments = list(shards(small, tmp_path / "d", "--views", 1))
    arguments[arguments.index(small / "palette.npy")] = tmp_path / "palette.npy"
    result = igpt_data(*arguments)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert "24 images read" in result.stdout
    train, val = (Dataset.open(tmp_path / "d" / split) for split in ("train", "val"))
    assert train.rows + val.rows == 24
    result = igpt_data("verify", tmp_path / "d" / "train")
    assert result.returncode == 0, result.stderr
    assert "5 of 5 colours used" in result.stdout
    again = igpt_data(*arguments)
    assert again.returncode == 0
    assert again.stdout.count("nothing to do") == 2


def test_no_holdout_is_said(small: Path, tmp_path: Path) -> None:
    result = igpt_data(*shards(small, tmp_path / "d", "--holdout", 0))
    assert result.returncode == 0, result.stderr
    assert "no validation split" in result.stdout
    assert not (tmp_path / "d" / "val").exists()


@pytest.mark.parametrize("command", [(), ("palette",), ("shards",), ("select",), ("verify",), ("inspect",)])
def test_help_teaches_by_an_example(command: tuple[str, ...]) -> None:
    result = igpt_data(*command, "--help")
    assert result.returncode == 0
    assert f"  igpt-data {command[0] if command else 'palette'} " in result.stdout


def test_help_imports_nothing_heavy() -> None:
    code = "import sys, data_prep.cli as c\ntry: c.cli(['shards', '--help'])\nexcept SystemExit: pass\n"
    code += "print([m for m in ('torch', 'numpy', 'PIL', 'sklearn', 'tqdm', 'deepspeed') if m in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60, check=True
    )
    assert result.stdout.splitlines()[-1] == "[]"


def test_nothing_loads_torch(small: Path, tmp_path: Path) -> None:
    arguments = [str(a) for a in shards(small, tmp_path / "d")]
    code = f"import sys, data_prep.cli as c\nc.cli({arguments!r}, standalone_mode=False)\n"
    code += "assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=ROOT, timeout=60, check=True)


def bad_image(tmp_path: Path, small: Path, data: bytes) -> Path:
    images = tmp_path / "images"
    for path in (small / "images").rglob("*.png"):
        target = images / path.relative_to(small / "images")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    (images / "x" / "bad.png").write_bytes(data)
    return images


@pytest.mark.parametrize("kind", ["no image", "truncated", "huge", "empty", "not square"])
def test_a_bad_image_is_named_and_nothing_written(small: Path, tmp_path: Path, kind: str) -> None:
    good = (small / "images" / "x" / "0.png").read_bytes()
    buffer = io.BytesIO()
    Image.new("L", (8, 6)).save(buffer, "PNG")
    header = b"IHDR" + (50_000).to_bytes(4, "big") * 2 + good[24:29]
    content = {
        "no image": b"<html>not found</html>",
        "truncated": good[:60],
        "huge": good[:12] + header + zlib.crc32(header).to_bytes(4, "big") + good[33:],
        "empty": b"",
        "not square": buffer.getvalue(),
    }
    wrong = {
        "no image": "not an image",
        "truncated": "truncated",
        "huge": "pixels",
        "empty": "empty file",
        "not square": "not square",
    }
    images = bad_image(tmp_path, small, content[kind])
    message = refused(*shards(small, tmp_path / "d", images=images))
    assert "x/bad.png" in message
    assert wrong[kind] in message
    assert "mend or remove it" in message
    assert not (tmp_path / "d").exists()
    if kind != "not square":
        message = refused("palette", images, "--k", 4, "--no-crop", "--out", tmp_path / "new.npy")
        assert "x/bad.png" in message
        assert not (tmp_path / "new.npy").exists()


def test_bad_arguments(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    def refused(*arguments: object) -> str:
        """In this process, for there are many."""
        monkeypatch.setattr(sys, "argv", ["igpt-data", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capsys.readouterr()
        assert (end.value.code, out, err.count("\n")) == (2, "", 1), err
        return err

    images, out = small / "images", tmp_path / "d"
    (tmp_path / "empty").mkdir()
    (tmp_path / "mixed" / "cat").mkdir(parents=True)
    (tmp_path / "mixed" / "loose.png").write_bytes(b"x")
    (tmp_path / "file").write_text("x")
    palette = ("--palette", small / "palette.npy", "--out", out)
    for arguments, complaint in [
        (("shards", "imagenet21k", images, *palette), "no such source: choose from"),
        (("shards", "image_folder", tmp_path / "none", *palette), "no such folder"),
        (("shards", "image_folder", tmp_path / "file", *palette), "not a folder"),
        (("shards", "image_folder", tmp_path / "empty", *palette), "no images"),
        (("shards", "image_folder", tmp_path / "mixed", *palette), "loose.png beside folders such as cat"),
        (("shards", "image_folder", images, "--out", out), "--palette"),
        (("shards", "image_folder", images, "--palette", tmp_path / "none.npy", "--out", out), "no such palette"),
        (("shards", "image_folder", images, "--palette", tmp_path / "file", "--out", out), "not a readable"),
        (shards(small, out, "--resolution", 0), "--resolution"),
        (shards(small, out, "--holdout", 1), "--holdout"),
        (shards(small, out, "--holdout", 1e-9), "none is left for validation"),
        (shards(small, out, "--views", 2), "all views are the same"),
        (("shards", "image_folder", images, *palette, "--resolution", 300), "larger than the crop"),
        (shards(small, tmp_path / "file" / "d"), "a part of the path is a file"),
        (shards(small, out, "--views", 2, "--resolution", 8), "all views are the same"),
        (("shards", "image_folder", images, *palette, "--views", 2, "--no-augment"), "all views are the same"),
        (shards(small, out, "--holdout", 0, "--split", "val"), "--holdout 0 holds nothing out"),
        (shards(small, out, "--split", "valid"), "--split"),
        (shards(small, out, "--option", "colour=red"), "image_folder has no such option"),
        (shards(small, out, "--option", "colour"), "is not NAME=VALUE"),
        (shards(small, out, "--selection", tmp_path / "none.npz"), "no such selection"),
        (shards(small, out, "--workers", 0), "--workers"),
        (shards(small, out, "--slurm-partition", "cpu"), "--slurm-partition: is for --executor slurm"),
        (shards(small, out, "--wait"), "--wait: is for --executor slurm"),
        (shards(small, out, "--executor", "slurm", "--slurm-time", "soon"), "--slurm-time soon: no time"),
        (("shards", "image_folder", images, tmp_path / "empty", *palette), "reads one folder"),
        (("palette", images, "--k", 4, "--no-crop", "--share", 1e-9, "--out", out), "raise --share"),
        (("palette", images, "--k", 6, "--no-crop", "--out", out), "only 5 unique colours"),
        (("palette", images, "--k", 0, "--out", out), "--k 0"),
        (("palette", images), "--out"),
        (("palette", "a", "b", "c", "--out", out), "reads one folder"),
        (("verify", tmp_path / "none"), "half-built or not a dataset"),
        (("verify",), "DATA"),
        (("polish",), "No such command"),
        (("--polish",), "No such option"),
    ]:
        assert complaint in refused(*arguments), arguments
        assert not out.exists()


def test_another_dataset_in_the_way(small: Path, tmp_path: Path) -> None:
    assert igpt_data(*shards(small, tmp_path / "d")).returncode == 0
    message = refused(*shards(small, tmp_path / "d", "--seed", 5))
    assert "seed was 0 and is 5" in message
    assert "--force" in message
    assert igpt_data(*shards(small, tmp_path / "d", "--seed", 5, "--force")).returncode == 0


def test_a_folder_of_splits_is_verified_whole_and_one_is_inspected(small: Path, tmp_path: Path) -> None:
    assert igpt_data(*shards(small, tmp_path / "d", "--holdout", 0.5)).returncode == 0
    told = igpt_data("verify", tmp_path / "d").stdout
    assert f"{tmp_path}/d/train (train split" in told and f"{tmp_path}/d/val (val split" in told
    assert told.count("every sha256 right") == 2
    assert f"holds the splits train, val: name one of them, e.g. {tmp_path}/d/train" in refused(
        "inspect", tmp_path / "d"
    )


def test_verify_names_the_damage(small: Path, tmp_path: Path) -> None:
    assert igpt_data(*shards(small, tmp_path / "d")).returncode == 0
    tar = tmp_path / "d" / "train" / "train-00000.tar"
    data = bytearray(tar.read_bytes())
    data[800] ^= 0x40
    tar.write_bytes(data)
    assert "train-00000.tar: damaged shard" in refused("verify", tmp_path / "d" / "train")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every write fails as on a full disk; the message says so and no file of ours is left."""
    from data_prep.shards.job import begin
    from data_prep.shards.plan import Settings
    from tests.helpers.places import build_here

    def full(file: Path, mode: str = "r") -> object:
        return open("/dev/full", "wb") if "x" in mode else open(file, mode)

    monkeypatch.setattr("igpt_ds.atomic.open", full, raising=False)
    source = open_source("image_folder", [str(small / "images")])
    job = begin(source, tmp_path / "d", Palette.load(small / "palette.npy"), Settings(8, 0.25, 1, False, 0, 100))
    with pytest.raises(UserError, match="the disk is full"):
        build_here(job)
    assert not (tmp_path / "d").exists()


def test_sources_are_found_by_name() -> None:
    assert "image_folder" in names()
