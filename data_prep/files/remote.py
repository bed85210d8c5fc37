"""Read a file wherever it lies: a local path, or an http, https, s3, gs or hf URL through fsspec.

A remote file is fetched into an anonymous temporary file (in TMPDIR) before it is read: only then is it known to
be whole, its members can be read in any order, and a connection that broke can be taken up by beginning again.
"""

import ipaddress
import os
import re
import socket
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from igpt_ds.errors import UserError

PROTOCOLS = ("http", "https", "s3", "gs", "hf")
_ATTEMPTS = 3
_PASSING = {408, 425, 429}  # of the statuses 400 to 499, those that mean: later
_CHUNK = 8 << 20

Found = TypeVar("Found")


def existing(urls: Iterable[str]) -> list[str]:
    """Those of the local paths and URLs that are there, in their order."""
    urls = list(urls)
    if not any(scheme(url) for url in urls):
        return [url for url in urls if is_there(url)]
    with ThreadPoolExecutor(32) as pool:
        return [url for url, there in zip(urls, pool.map(is_there, urls), strict=True) if there]


def opened(url: str) -> BinaryIO:
    """Open a file for reading at will; a remote one is read piece by piece, as it is asked for."""
    if scheme(url):
        return _tried(url, lambda: _remote(url))
    with reading(url):
        # Opening a named pipe would wait for ever.
        if not stat.S_ISREG(Path(url).stat().st_mode):
            raise UserError(f"{url}: not a regular file: mend the path")
        return open(url, "rb")


def fetched(url: str) -> BinaryIO:
    """Open a file of this machine that holds all of `url`; a remote one is copied first.

    Raises:
        UserError: it is not there, or could not be read whole in three attempts.
    """
    if url.startswith("pipe:"):
        return _output(url)
    if not scheme(url):
        return opened(url)
    return _tried(url, lambda: _copied(url))


def _remote(url: str) -> BinaryIO:
    remote, path = filesystem(url)
    file: BinaryIO = remote.open(path, "rb")
    return file


def _copied(url: str) -> BinaryIO:
    file: BinaryIO = tempfile.TemporaryFile()  # noqa: SIM115 (the caller closes it)
    try:
        with _remote(url) as remote:
            size = getattr(remote, "size", None)
            while chunk := remote.read(_CHUNK):
                file.write(chunk)
        if size is not None and file.tell() != size:
            raise OSError(f"{file.tell()} of {size} bytes came")
        file.seek(0)
    except BaseException:
        file.close()
        raise
    return file


def _tried(url: str, action: Callable[[], Found]) -> Found:
    """What the action gives; what may be a passing fault of the network or of the server is tried again.

    Raises:
        UserError: it failed, and once more would not help.
    """
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            return action()
        except Exception as error:
            if attempt == _ATTEMPTS or _is_final(error):
                raise unreadable(url, error) from error
        time.sleep(4.0 ** (attempt - 1))
    raise AssertionError


def _is_final(error: BaseException) -> bool:
    """Would it be the same once more?"""
    cause = error.__cause__ or error
    status = getattr(cause, "status", 0)
    told = isinstance(error, PermissionError | ImportError) or isinstance(cause, UserError)
    return told or _is_missing(error) or (400 <= status < 500 and status not in _PASSING)


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Turn the operating system's complaint about reading `path` into a `UserError`."""
    try:
        yield
    except OSError as error:
        raise unreadable(str(path), error) from error


def read_text(path: str, what: str) -> str:
    """A small text file that the user gave, UTF-8.

    Raises:
        UserError: it is not there, is no text, or is larger than 64 MiB.
    """
    limit = 64 << 20
    with opened(path) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise UserError(f"{path}: too large for {what}: mend the path")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path}: not the text of {what}: mend the path") from None


def scheme(path: str) -> str | None:
    """A URL's protocol; None for a local path."""
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)(?:://|::)", path)
    return match[1].lower() if match else None


def is_there(url: str) -> bool:
    """Is there a file or folder?"""
    if not scheme(url):
        return os.path.lexists(url)
    return _tried(url, lambda: _has(url))


def _has(url: str) -> bool:
    remote, path = filesystem(url)
    try:
        remote.info(path)  # `exists` takes a failing server for a missing file
    except Exception as error:
        if _is_missing(error):
            return False
        raise
    return True


def filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path in it."""
    try:
        import fsspec

        options: dict[str, Any] = {}
        if scheme(url) in {"http", "https"}:
            options = {"client_kwargs": {"trace_configs": [_redirects()]}}
        elif scheme(url) == "hf":
            options = {"endpoint": os.environ.get("HF_ENDPOINT")}  # a mirror
        remote, path = fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        raise UserError(
            f'{url}: remote files need fsspec and the library of their protocol: pip install "igpt-ds[remote]"'
        ) from error
    except Exception as error:
        raise unreadable(url, error) from error
    return remote, path


@cache
def _redirects() -> Any:
    """Refuse to be sent by a server of the internet to an address of this machine or of its network."""
    import aiohttp

    async def refuse(_session: Any, _context: Any, params: Any) -> None:
        answer = params.response.headers
        target = params.url.join(type(params.url)(answer.get("Location") or answer.get("URI") or ""))
        if _is_public(params.url.host) and not _is_public(target.host):
            raise UserError(f"{params.url}: leads to {target}, which is not of the internet: give that URL itself")

    config = aiohttp.TraceConfig()
    config.on_request_redirect.append(refuse)
    return config


def _is_public(host: str | None) -> bool:
    """Are all addresses of a host of the internet? One that is not known is: nothing can be asked of it."""
    try:
        found = socket.getaddrinfo(host, None)
    except (OSError, UnicodeError):
        return True
    return all(ipaddress.ip_address(str(address[0]).partition("%")[0]).is_global for *_, address in found)


def _output(command: str) -> BinaryIO:
    file: BinaryIO = tempfile.TemporaryFile()  # noqa: SIM115 (the caller closes it)
    status = subprocess.run(
        ["/bin/sh", "-c", command.removeprefix("pipe:")], stdin=subprocess.DEVNULL, stdout=file, check=False
    ).returncode
    if status != 0:
        file.close()
        raise UserError(f"{command}: ended with status {status}: mend the command")
    file.seek(0)
    return file


def _is_missing(error: BaseException | None) -> bool:
    """Is the file not there? fsspec tells so of any failure over http, and why only in the error's cause."""
    if not isinstance(error, FileNotFoundError):
        return False
    cause = error.__cause__
    answered = getattr(cause, "status", None) in {404, 410}
    return answered or cause is None or isinstance(cause, FileNotFoundError) or "botocore" in type(cause).__module__


def unreadable(url: str, error: BaseException) -> UserError:
    """What to tell the user of an error in reading `url`."""
    if _is_missing(error):
        return UserError(f"{url}: no such file: mend the path")
    if isinstance(error, FileNotFoundError) and error.__cause__:
        error = error.__cause__
    if isinstance(error, UserError):
        return error
    text = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
    return UserError(f"{url}: cannot be read ({text}): mend the path, the rights or the connection")
