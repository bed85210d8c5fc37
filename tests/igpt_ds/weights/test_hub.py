"""Models of the hub, from a server on this machine: downloaded, checked, kept, found without a network."""

import shutil
from pathlib import Path

import pytest
import torch

import igpt_ds
from igpt_ds import hub as hubs
from igpt_ds.dataset.palette import Palette
from igpt_ds.errors import RunError, UserError
from igpt_ds.weights.formats import open_weights
from tests.helpers.hub import Hub, hub
from tests.igpt_ds.weights.conftest import Refused


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty one of the hub's client."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def server(whole: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """Models of the hub's layout: with safetensors and pickle, sharded, and with the old pickle alone."""
    both, old = tmp_path / "both", tmp_path / "old"
    for folder in (both, old):
        shutil.copytree(whole / "hf", folder)

        torch.save(_theirs(whole / "hf"), folder / "pytorch_model.bin")

    (old / "model.safetensors").unlink()
    (both / "training_args.bin").write_bytes(b"what nobody asked for")
    repositories = {
        "openai/imagegpt-small": both,
        "user/sharded": whole / "sharded",
        "user/old": old,
        "user/empty": _description_alone(whole, tmp_path),
    }
    with hub(repositories) as served:
        monkeypatch.setenv("HF_ENDPOINT", served.endpoint)
        yield served


def _theirs(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def _description_alone(whole: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "empty"
    folder.mkdir()
    shutil.copy(whole / "hf" / "config.json", folder)
    return folder


@pytest.mark.parametrize(
    "name", ["openai/imagegpt-small", "hf://openai/imagegpt-small", "hf://user/sharded", "hf://user/old"]
)
def test_the_hubs_model_is_the_one_that_was_put_there(server: Hub, whole: Path, name: str) -> None:
    there, here = open_weights(Path(name)), open_weights(whole / "hf")
    for key, tensor in here.weights().items():
        assert torch.equal(there.weights()[key], tensor), key
    assert (igpt_ds.load(name).palette.colours == igpt_ds.load(whole / "hf").palette.colours).all()


def test_only_what_is_needed_is_fetched_and_only_once(server: Hub) -> None:
    open_weights(Path("openai/imagegpt-small"))
    fetched = {request.rpartition("/")[2] for request in server.asked if request.startswith("GET /openai/")}
    assert fetched == {"config.json", "preprocessor_config.json", "model.safetensors"}
    server.asked.clear()
    open_weights(Path("openai/imagegpt-small"))
    assert not [request for request in server.asked if request.startswith("GET /openai/")]


@pytest.mark.parametrize("offline", ["no server", "told so"])
def test_without_a_network_the_cache_is_enough(
    server: Hub, whole: Path, monkeypatch: pytest.MonkeyPatch, offline: str
) -> None:
    names = ("openai/imagegpt-small", "hf://user/sharded")
    for name in names:
        open_weights(Path(name))
    if offline == "no server":
        monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    else:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        server.asked.clear()
    for name in names:
        assert open_weights(Path(name)).tensors.keys() == open_weights(whole / "hf").tensors.keys()
    assert offline == "no server" or not server.asked


def test_folders_of_the_cache_are_models_too(server: Hub, cache: Path, whole: Path) -> None:
    snapshot = open_weights(Path("openai/imagegpt-small")).path
    for place in (snapshot, cache / "models--openai--imagegpt-small"):
        assert open_weights(place).path == snapshot


def test_a_palette_is_taken_of_a_model(server: Hub, whole: Path) -> None:
    colours = Palette.load(whole / "run" / "palette.npy").colours
    places = [whole / "hf", whole / "hf" / "preprocessor_config.json", whole / "run", "openai/imagegpt-small"]
    for place in places:
        assert (Palette.load(Path(place)).colours == colours).all()
    fetched = {request.rpartition("/")[2] for request in server.asked if request.startswith("GET /openai/")}
    assert fetched == {"preprocessor_config.json"}
    with pytest.raises(UserError, match=r"hf://user/empty: holds no preprocessor_config.json"):
        Palette.load(Path("hf://user/empty"))
    with pytest.raises(UserError, match=r"config\.json: its clusters are no table of colours"):
        Palette.load(whole / "hf" / "config.json")


def test_a_file_that_arrives_damaged_is_not_kept(server: Hub) -> None:
    server.damage.add("model.safetensors")
    with pytest.raises(RunError, match=r"hf://openai/imagegpt-small: model\.safetensors arrived damaged"):
        open_weights(Path("openai/imagegpt-small"))
    server.damage.clear()
    open_weights(Path("openai/imagegpt-small"))


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("hf://user/none", "hf://user/none: the hub refuses it"),
        ("hf://user/empty", "holds neither model.safetensors nor pytorch_model.bin"),
        ("hf://user", "is not of the form hf://user/repo"),
        ("hf://user/repo/more", "is not of the form hf://user/repo"),
        ("hf://us--er/re..po", "hf://us--er/re..po: "),
        ("user/old", "user/old: no run directory and no checkpoint"),
    ],
)
def test_what_is_not_there_is_one_line(server: Hub, refused: Refused, name: str, complaint: str) -> None:
    assert complaint in refused(Path(name))


def test_a_server_that_does_not_answer_is_one_line(
    server: Hub, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hubs, "_ANSWER", 1.0)
    server.stalls.set()
    assert "the hub does not answer" in refused(Path("openai/imagegpt-small"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert "not in the cache: mend the network" in refused(Path("hf://user/old"))


def test_a_folder_of_that_name_comes_first(
    server: Hub, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("openai").mkdir()
    shutil.copytree(whole / "hf", "openai/imagegpt-small")
    assert open_weights(Path("openai/imagegpt-small")).path == Path("openai/imagegpt-small")
    assert not server.asked
    with pytest.raises(UserError, match="name a file by --json"):
        igpt_ds.evaluate("eval", "hf://user/old", data=tmp_path)
