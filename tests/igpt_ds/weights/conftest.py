"""One good example of each format, to be damaged; and a conversion that must refuse."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from igpt_ds import cli
from igpt_ds.weights.convert import convert
from tests.igpt_ds.weights.test_convert import saved_run

Refused = Callable[[Path], str]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one good example of each format."""
    folder = tmp_path_factory.mktemp("whole")
    run, _ = saved_run(folder / "run")
    convert(run, folder / "hf", "hf")
    convert(run, folder / "sharded", "hf", shard_bytes=20_000)
    convert(run, folder / "single", "safetensors")
    convert(run, folder / "out.npz", "npz")
    convert(run, folder / "native", "native")
    return folder


@pytest.fixture
def copies(whole: Path, tmp_path: Path) -> Path:
    """The same, to be damaged."""
    shutil.copytree(whole, tmp_path / "copies")
    return tmp_path / "copies"


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Convert in this process, see it refuse with nothing left behind, return its one line."""

    def call(source: Path) -> str:
        words = ["convert", source, tmp_path / "out", "--to", "native"]
        monkeypatch.setattr(sys, "argv", ["igpt-ds", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, errors = capsys.readouterr()
        assert (end.value.code, out) == (2, ""), errors
        assert errors.startswith("igpt-ds: ") and errors.count("\n") == 1, errors
        assert errors.count(": ") >= 3, f"not of the form name: what is wrong: what to do: {errors}"
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))
        return errors

    return call
