"""A hub on this machine: the part of Hugging Face's HTTP interface that its client asks for one model."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote


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
    for path in sorted(folder.iterdir()):
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

    def _answer(self, body: bool) -> None:
        self.server.asked.append(f"{self.command} {self.path}")
        if self.server.stalls.is_set():
            self.server.closing.wait(60)
            return
        parts = [unquote(part) for part in self.path.partition("?")[0].strip("/").split("/")]
        if parts[:2] == ["api", "models"]:
            self._describe("/".join(parts[2:4]), tree="tree" in parts[4:5])
        elif len(parts) > 4 and parts[2] == "resolve":
            self._send("/".join(parts[:2]), "/".join(parts[4:]), body)
        else:
            self._refuse()

    def _describe(self, name: str, tree: bool) -> None:
        folder = self.server.repositories.get(name)
        if folder is None:
            self._refuse()
            return
        files = [{"rfilename": path.name} for path in sorted(folder.iterdir())]
        text = json.dumps({"id": name, "modelId": name, "sha": commit_of(folder), "siblings": files, "tags": []})
        if tree:
            sizes = [(path.name, path.stat().st_size) for path in sorted(folder.iterdir())]
            text = json.dumps([{"type": "file", "path": each, "size": size, "oid": "0" * 40} for each, size in sizes])
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
        self.send_response(200)
        self.send_header("ETag", f'"{digest}"')
        self.send_header("X-Repo-Commit", commit_of(self.server.repositories[name]))
        if large:
            self.send_header("X-Linked-Etag", f'"{digest}"')
            self.send_header("X-Linked-Size", str(len(data)))
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
