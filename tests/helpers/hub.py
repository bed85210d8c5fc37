"""A hub on this machine: the part of Hugging Face's HTTP interface that its client asks for models and data."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote


class Hub(ThreadingHTTPServer):
    """Serves folders as repositories.

    Attributes:
        repositories: name -> folder.
        asked: method and path of each request.
        damage: names of files of which other bytes of the same length are sent.
        stalls: requests are taken, and never answered.
    """

    daemon_threads = True

    def __init__(self, repositories: dict[str, Path]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories, self.asked = repositories, list[str]()
        self.damage: set[str] = set()
        self.stalls = threading.Event()
        self.closing = threading.Event()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


def commit_of(folder: Path) -> str:
    """40 hex digits that change with what is in the folder."""
    digest = hashlib.sha1()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its name there
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_POST(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        self.server.asked.append(f"{self.command} {self.path}")
        if self.server.stalls.is_set():
            self.server.closing.wait(60)
            return
        parts = [unquote(part) for part in self.path.partition("?")[0].strip("/").split("/")]
        if parts[0] == "api":  # api, models or datasets, user, repository, ...
            self._describe("/".join(parts[2:4]), parts[4:])
            return
        if parts[0] == "datasets":
            parts = parts[1:]
        if len(parts) > 4 and parts[2] == "resolve":
            self._send("/".join(parts[:2]), "/".join(parts[4:]), body)
        else:
            self._refuse()

    def _describe(self, name: str, more: list[str]) -> None:
        folder = self.server.repositories.get(name)
        if folder is None:
            self._refuse()
            return
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        names = [path.relative_to(folder).as_posix() for path in paths]
        text = json.dumps({"id": name, "sha": commit_of(folder), "siblings": [{"rfilename": n} for n in names]})
        if more[:1] in (["tree"], ["paths-info"]):
            asked = names
            if more[0] == "paths-info":
                fields = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
                asked = fields.get("paths", [])
            elif len(more) > 2:
                asked = [n for n in names if n.startswith("/".join(more[2:]) + "/")]
            facts = [
                {"type": "file", "path": n, "size": path.stat().st_size, "oid": "0" * 40}
                for n, path in zip(names, paths, strict=True)
                if n in asked
            ]
            folders = {n.rpartition("/")[0] for n in names} - {""}
            facts += [{"type": "directory", "path": n, "oid": "0" * 40} for n in folders if n in asked]
            text = json.dumps(facts)
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def _send(self, name: str, file: str, body: bool) -> None:
        path = self.server.repositories[name] / file
        if not path.is_file():
            self._refuse()
            return
        data = path.read_bytes()
        large = path.suffix in (".safetensors", ".bin")
        digest = hashlib.sha256(data).hexdigest() if large else hashlib.sha1(data).hexdigest()
        if file in self.server.damage:
            data = bytes(byte ^ 1 for byte in data)
        total, part = len(data), self.headers.get("Range", "").removeprefix("bytes=")
        if part:
            first, _, last = part.partition("-")
            data = data[int(first) : int(last) + 1 if last else None]
        self.send_response(206 if part else 200)
        if part:
            self.send_header("Content-Range", f"bytes {first}-{int(first) + len(data) - 1}/{total}")
        self.send_header("ETag", f'"{digest}"')
        self.send_header("X-Repo-Commit", commit_of(self.server.repositories[name]))
        if large:
            self.send_header("X-Linked-Etag", f'"{digest}"')
            self.send_header("X-Linked-Size", str(total))
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def _refuse(self) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()


@contextmanager
def hub(repositories: dict[str, Path]) -> Iterator[Hub]:
    """A hub for the length of a test."""
    server = Hub(repositories)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()
