"""The wheel, installed where there is no checkout, does what the README does."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from igpt_ds import __version__

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from what the wheel is made of, in a folder of its own: a build leaves its traces there."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("igpt_ds", "data_prep", "ds_configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    words = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*words, "--wheel-dir", str(folder), str(folder)], check=True, timeout=200)
    (built,) = folder.glob("*.whl")
    return built


def test_what_is_in_it(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (archive.read(name).decode() for name in names if name.endswith("METADATA"))
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"igpt_ds", "data_prep"}
    kept = {str(path.relative_to(ROOT)) for name in ("igpt_ds", "data_prep") for path in (ROOT / name).rglob("*.*")}
    kept = {name for name in kept if "__pycache__" not in name}
    kept |= {f"igpt_ds/ds_configs/{path.name}" for path in (ROOT / "ds_configs").iterdir()}
    assert {name for name in names if "dist-info" not in name} == kept
    for version in ("3.11", "3.13"):
        assert f"Classifier: Programming Language :: Python :: {version}\n" in metadata


@pytest.mark.distributed
@pytest.mark.timeout(300)
def test_it_works_from_an_empty_directory(wheel: Path, photos: Path, tmp_path: Path) -> None:
    """All that the package needs lies in the tested environment; its checkout is not to be seen."""
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    environment = {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "RANK", "WORLD_SIZE")
    }
    environment |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, str(wheel)], check=True, timeout=100, env=environment)
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    (site / "tested.pth").write_text(sysconfig.get_path("purelib") + "\n")
    empty = tmp_path / "empty"
    empty.mkdir()

    def call(line: str) -> str:
        program, *words = (word.replace("IMAGES", str(photos)) for word in line.split())
        done = subprocess.run(
            [str(python.with_name(program)), *words],
            cwd=empty,
            env=environment,
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    where = subprocess.check_output(
        [str(python), "-c", "import igpt_ds; print(igpt_ds.__file__)"], cwd=empty, env=environment, text=True
    )
    assert Path(where).is_relative_to(site)
    assert call("igpt-data --version").endswith(f"version {__version__}\n")
    assert "zero3" in call("igpt-ds plan xl")
    call("igpt-data palette IMAGES --k 16 --resolution 8 --out palette.npy")
    call("igpt-data shards image_folder IMAGES --palette palette.npy --resolution 8 --holdout 0.25 --out DATA")
    call("igpt-ds pretrain RUN --preset tiny --data DATA --set training.steps=2 --set training.batch=4")
    assert "layer" in call("igpt-ds probe RUN --data DATA --images 6 --regularisation 1")
    assert json.loads((empty / "RUN" / "probe.json").read_text())["step"] == 2
    call("igpt-ds finetune TUNED --from RUN --data DATA --set training.steps=1 --set training.batch=4")
    call("igpt-ds doctor RUN")
    assert (empty / "TUNED" / "result.json").is_file()
