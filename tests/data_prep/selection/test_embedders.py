"""Embedders: principal components against scikit-learn; networks that load no more than tensors, and the right ones."""

import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_prep.selection.embedders import Embedder, _network, names, open_embedder
from igpt_ds.errors import UserError


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [
        Image.fromarray(rng.integers(0, 256, (5, 7, 3)).astype(np.uint8)).resize((70, 50), Image.Resampling.BICUBIC)
        for _ in range(120)
    ]


def test_there_are_these() -> None:
    assert names() == ["open_clip", "timm", "tiny_pca"]
    with pytest.raises(UserError, match="no such embedder: choose from open_clip, timm, tiny_pca"):
        open_embedder("clip", None, None)


def test_tiny_pca_is_principal_components(images: list[Image.Image]) -> None:
    from sklearn.decomposition import PCA

    embedder = open_embedder("tiny_pca", None, None)
    fitted = embedder.fitted(embedder.fit(iter(images)))
    tiny = np.stack([fitted.prepare(image) for image in images])
    assert tiny.shape == (120, 16, 16, 3)
    found = fitted.embed(tiny)
    expected = PCA(64, svd_solver="full").fit_transform(tiny.reshape(120, -1) / 255.0)
    # Components have no sign.
    assert np.allclose(np.abs(found), np.abs(expected), atol=1e-4)
    again = pickle.loads(pickle.dumps(fitted)).embed(tiny)
    assert (again == found).all()
    # The signs are fixed, too: the largest entry of each component is positive.
    learnt = embedder.fit(iter(images))["components"]
    assert (learnt[np.abs(learnt).argmax(0), np.arange(64)] > 0).all()


def test_an_image_that_is_the_mean_still_has_a_direction() -> None:
    grey = Image.new("RGB", (20, 20), (128, 128, 128))
    embedder = open_embedder("tiny_pca", None, None)
    fitted = embedder.fitted(embedder.fit(iter([grey, grey])))
    assert np.linalg.norm(fitted.embed(fitted.prepare(grey)[None])) > 0


def test_tiny_pca_refuses(images: list[Image.Image]) -> None:
    with pytest.raises(UserError, match="takes neither --model nor --weights"):
        open_embedder("tiny_pca", "resnet50", None)
    with pytest.raises(UserError, match="not one image can be read"):
        open_embedder("tiny_pca", None, None).fit(iter([]))
    with pytest.raises(RuntimeError, match="before it is fitted"):
        open_embedder("tiny_pca", None, None).embed(np.zeros((1, 16, 16, 3), np.uint8))


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """timm and open_clip as far as they are used: a convolution of 8 x 8 images and, in timm, a classifier."""
    import torch

    class Net(torch.nn.Module):
        def __init__(self, classes: int = 0) -> None:
            super().__init__()
            self.stem = torch.nn.Conv2d(3, 5, 8)
            self.head = torch.nn.Linear(5, classes) if classes else torch.nn.Identity()
            self.pretrained_cfg = {"classifier": "head"}

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.head(self.stem(x).flatten(1))
            return found

    class Clip(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.visual, self.text = Net(), torch.nn.Linear(2, 2)

    pixels = {"input_size": (3, 8, 8), "crop_pct": 0.5, "crop_mode": "center", "interpolation": "bilinear"}
    colours = {"mean": (0.5, 0.25, 0.0), "std": (0.5, 1.0, 2.0)}
    timm, data, clip = (ModuleType(name) for name in ("timm", "timm.data", "open_clip"))
    for module in (timm, clip):
        module.__spec__ = type(sys.__spec__)(module.__name__, None)
    made: dict[str, Any] = {
        "is_model": lambda name: name == "net",
        "create_model": lambda name, pretrained, num_classes: Net(num_classes),
        "data": data,
    }
    vars(timm).update(made)
    vars(data)["resolve_model_data_config"] = lambda model: pixels | colours
    made = {
        "list_models": lambda: ["net"],
        "create_model": lambda name, pretrained, pretrained_hf: Clip(),
        "get_model_preprocess_cfg": lambda model: {
            "size": 8, "resize_mode": "shortest", "interpolation": "bicubic", **colours
        },
    }  # fmt: skip
    vars(clip).update(made)
    for module in (timm, data, clip):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    _network._on_device.cache_clear()
    yield
    _network._on_device.cache_clear()


def weights(path: Path, prefix: str = "", **more: Any) -> dict[str, Any]:
    """Write random weights of the convolution and a classifier, wrapped as training scripts do."""
    import torch

    torch.manual_seed(0)
    tensors = {"stem.weight": torch.randn(5, 3, 8, 8), "stem.bias": torch.randn(5)}
    named = {f"{prefix}{name}": tensor for name, tensor in tensors.items()} | more
    if path.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file(named, path)
    else:
        torch.save({"epoch": 3, "state_dict": {f"module.{name}": tensor for name, tensor in named.items()}}, path)
    return tensors


def by_hand(image: Image.Image, share: float, resampling: Image.Resampling, tensors: dict[str, Any]) -> np.ndarray:
    """The centre of the image at 8 x 8, normalised and folded with the weights: float64 [5]."""
    side = min(image.size) * share
    left, top = (image.width - side) / 2, (image.height - side) / 2
    cut = image.resize((8, 8), resampling, (left, top, left + side, top + side))
    pixels = (np.asarray(cut) / 255 - [0.5, 0.25, 0.0]) / [0.5, 1.0, 2.0]
    return np.einsum("ochw,hwc->o", tensors["stem.weight"].double().numpy(), pixels) + tensors["stem.bias"].numpy()


@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize(
    ("name", "prefix", "more", "share", "resampling"),
    [
        ("timm", "", "head.weight", 0.5, Image.Resampling.BILINEAR),
        ("open_clip", "visual.", "text.weight", 1.0, Image.Resampling.BICUBIC),
    ],
)
def test_a_network_sees_what_it_was_trained_on(
    name: str,
    prefix: str,
    more: str,
    share: float,
    resampling: Image.Resampling,
    suffix: str,
    tmp_path: Path,
    images: list[Image.Image],
) -> None:
    import torch

    path = tmp_path / f"weights{suffix}"
    tensors = weights(path, prefix, **{more: torch.zeros(2, 5)})
    embedder: Embedder = pickle.loads(pickle.dumps(open_embedder(name, "net", path)))
    assert embedder.record()["model"] == "net"
    assert len(embedder.record()["weights"]) == 64
    threads = torch.get_num_threads()
    found = embedder.embed(np.stack([embedder.prepare(image) for image in images[:3]]))
    assert torch.get_num_threads() == threads
    assert found.dtype == np.float32
    expected = [by_hand(image, share, resampling, tensors) for image in images[:3]]
    assert np.allclose(found, expected, atol=1e-3)


class Bomb:
    """Unpickled, it would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.write_text, (self.path, "unpickled")


@pytest.mark.usefixtures("packages")
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_weights_run_no_code(tmp_path: Path, images: list[Image.Image]) -> None:
    import torch

    torch.save({"state_dict": Bomb(tmp_path / "harm")}, tmp_path / "bomb.pth")
    (tmp_path / "bomb.pkl").write_bytes(pickle.dumps(Bomb(tmp_path / "harm")))
    for name in ("bomb.pth", "bomb.pkl"):
        with pytest.raises(UserError, match="cannot be loaded safely"):
            open_embedder("timm", "net", tmp_path / name).prepare(images[0])
    assert not (tmp_path / "harm").exists()


@pytest.mark.usefixtures("packages")
def test_networks_refuse(tmp_path: Path, images: list[Image.Image]) -> None:
    import torch

    good = tmp_path / "good.safetensors"
    weights(good)
    cases: list[tuple[str, str | None, dict[str, Any], str]] = [
        ("timm", None, {}, "needs --model"),
        ("timm", "hf-hub:timm/net", {}, "is fetched from elsewhere"),
        ("timm", "other", {}, "timm has no such model"),
        ("open_clip", "other", {}, "open_clip has no such model"),
        ("open_clip", "net", {}, "not those of net .they lack stem.weight"),
        ("timm", "net", {"prefix": "x."}, "not those of net .they lack stem.weight"),
        ("timm", "net", {"tail": torch.zeros(2)}, "not those of net .they have an unknown tail"),
    ]
    for number, (name, model, options, complaint) in enumerate(cases):
        path = tmp_path / f"{number}.safetensors"
        weights(path, **options)
        with pytest.raises(UserError, match=complaint):
            open_embedder(name, model, path).prepare(images[0])
    other = tmp_path / "other.pth"
    torch.save({"stem.weight": torch.zeros(4, 3, 8, 8), "stem.bias": torch.zeros(4)}, other)
    with pytest.raises(UserError, match=r"not those of net .*size mismatch"):
        open_embedder("timm", "net", other).prepare(images[0])
    torch.save([1, 2], other)
    with pytest.raises(UserError, match="holds no tensors by name"):
        open_embedder("timm", "net", other).prepare(images[0])
    with pytest.raises(UserError, match="no such file"):
        open_embedder("timm", "net", tmp_path / "none.pth")
    with pytest.raises(UserError, match="needs --weights"):
        open_embedder("timm", "net", None)


def test_a_missing_package_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "weights.pth").write_bytes(b"x")
    monkeypatch.setattr(_network, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'pip install "igpt-ds\[select\]"'):
        open_embedder("open_clip", "net", tmp_path / "weights.pth").record()
