"""What the tests of the sources share: images of known pixels, tars written by the standard library, refusals."""

import io
import pickle
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_prep.sources import Encoded, ListedSource, Source, StreamedSource, open_source
from igpt_ds.errors import UserError
from igpt_ds.images.transforms import evaluation


def random_pixels(seed: int, side: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


def png(seed: int, side: int = 8) -> bytes:
    out = io.BytesIO()
    Image.fromarray(random_pixels(seed, side)).save(out, "PNG")
    return out.getvalue()


def decoded(data: bytes | OSError) -> np.ndarray:
    """The pixels as the rest of the pipeline sees them."""
    assert isinstance(data, bytes), data
    return evaluation(None, crop=False).pixels(data, "", 0)


def tar_bytes(members: Iterable[tuple[str | tarfile.TarInfo, bytes]], kind: int = tarfile.GNU_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=kind) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name) if isinstance(name, str) else name
            info.size = len(data) if info.isreg() else 0
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def listed(name: str, *paths: Path | str, **options: str) -> ListedSource:
    source: Any = travelled(open_source(name, [str(path) for path in paths], options))
    assert not hasattr(source, "parts")
    return source


def streamed(name: str, *paths: Path | str, **options: str) -> StreamedSource:
    source: Any = travelled(open_source(name, [str(path) for path in paths], options))
    assert hasattr(source, "parts")
    return source


def travelled(source: Source) -> Source:
    """The source as a worker gets it, which must be small."""
    data = pickle.dumps(source)
    assert len(data) < 50_000
    copy: Source = pickle.loads(data)
    assert copy == source
    return copy


def everything(source: StreamedSource, pool: str = "train") -> list[Encoded]:
    return [found for part in source.parts(pool) for found in source.stream(part)]  # type: ignore[arg-type]


def reason(found: Encoded) -> str | None:
    """Why an image is rejected; None where it is not."""
    return getattr(found.data, "reason", "unreadable") if isinstance(found.data, OSError) else None


def refusal(call: Callable[[], object]) -> str:
    """The one line by which a call refuses its input."""
    with pytest.raises(UserError) as refused:
        call()
    line = str(refused.value)
    assert "\n" not in line
    assert line.count(": ") >= 2, "what, the fault and the remedy"
    return line
