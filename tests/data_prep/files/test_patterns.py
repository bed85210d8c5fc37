"""The files of a collection: names, patterns, servers that fail, and commands that must not run."""

import http.server
import os
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_prep.files import patterns, remote
from data_prep.files.patterns import FileSet
from data_prep.sources._class_names import read_classes
from tests.helpers.source_fixtures import refusal


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)


def read_all(given: FileSet) -> dict[str, str]:
    """Content by name."""
    found = {}
    for name in given.names():
        with remote.fetched(given.url(name)) as file:
            found[name] = file.read().decode()
    return found


def tars(*paths: object, allow_pipe: bool = False) -> FileSet:
    return FileSet(tuple(str(path) for path in paths), ".tar", allow_pipe)


def test_names_do_not_depend_on_how_the_files_are_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "w/08.tar", "w/09.tar", "w/10.tar", "w/10.json", "w/.hidden.tar", "w/.d/1.tar", "w/deep/1.tar")
    w = tmp_path / "w"
    flat = ["08.tar", "09.tar", "10.tar"]
    assert tars(w).names() == tars(f"{w}/").names() == [*flat, "deep/1.tar"]
    for pattern in ("{08..10}.tar", "{08,09,10}.tar", "*.tar", "[01]*.tar"):
        assert tars(w / pattern).names() == flat, pattern
    assert tars(*(w / name for name in flat)).names() == flat
    monkeypatch.chdir(w)
    assert tars("*.tar").names() == tars("{08..10}.tar").names() == tars(*flat).names() == flat
    assert tars(".").names() == [*flat, "deep/1.tar"]
    assert read_all(tars("*.tar"))["09.tar"] == "w/09.tar"
    assert {name: text.removeprefix("w/") for name, text in read_all(tars(w)).items()} == {
        name: name for name in (*flat, "deep/1.tar")
    }


def test_patterns_over_folders_keep_the_folder_in_the_name(tmp_path: Path) -> None:
    touch(tmp_path, "a/1.tar", "b/1.tar", "c/1.tar")
    assert read_all(tars(tmp_path / "{a,b}")) == {"a/1.tar": "a/1.tar", "b/1.tar": "b/1.tar"}
    assert read_all(tars(f"{tmp_path}/*/1.tar")) == {f"{d}/1.tar": f"{d}/1.tar" for d in "abc"}
    assert read_all(tars(f"{tmp_path}/{{a,b}}/{{1..1}}.tar")) == {"a/1.tar": "a/1.tar", "b/1.tar": "b/1.tar"}


def test_two_files_of_one_name_are_refused(tmp_path: Path) -> None:
    touch(tmp_path, "a/1.tar", "b/1.tar", "b/2.tar")
    assert "give the folder that holds both" in refusal(tars(tmp_path / "a", tmp_path / "b").names)
    assert tars(tmp_path / "b", tmp_path / "b").names() == ["1.tar", "2.tar"]
    assert tars(tmp_path / "b/2.tar", f"{tmp_path}/a/../b/2.tar", f"{tmp_path}/./b/*.tar").names() == ["1.tar", "2.tar"]
    two = tars(tmp_path / "a/1.tar", tmp_path / "b/2.tar")
    assert read_all(two) == {"1.tar": "a/1.tar", "2.tar": "b/2.tar"}


def test_literal_names_that_look_like_patterns(tmp_path: Path) -> None:
    touch(tmp_path, "{1..2}.tar", "w[x]/a.tar")
    assert read_all(tars(tmp_path / "{1..2}.tar")) == {"{1..2}.tar": "{1..2}.tar"}
    assert read_all(tars(tmp_path / "w[x]")) == {"a.tar": "w[x]/a.tar"}


def test_patterns_below_folders_that_look_like_patterns(tmp_path: Path) -> None:
    touch(tmp_path, "we[b] 1/a.tar", "we[b] 1/b.tar", "{x,y}/1.tar", "{x,y}/deep/2.tar", "web 1/c.tar")
    for pattern in ("*.tar", "{a,b}.tar", "[ab].tar"):
        assert tars(tmp_path / "we[b] 1" / pattern).names() == ["a.tar", "b.tar"], pattern
        assert read_all(tars(tmp_path / "we[b] 1" / pattern))["a.tar"] == "we[b] 1/a.tar"
    assert read_all(tars(tmp_path / "{x,y}/{1..1}.tar")) == {"1.tar": "{x,y}/1.tar"}
    assert tars(tmp_path / "{x,y}/*/2.tar").names() == ["deep/2.tar"]
    assert tars(tmp_path / "w*/*.tar").names() == ["we[b] 1/a.tar", "we[b] 1/b.tar", "web 1/c.tar"]


def test_links_are_followed_and_each_folder_read_once(tmp_path: Path) -> None:
    touch(tmp_path, "link/part2/b.tar", "store/a.tar", "store/deep/c.TAR", "link/__MACOSX/x.tar", "link/@eaDir/y.tar")
    link = tmp_path / "link"
    (link / "part1").symlink_to("../store")
    expected = ["part1/a.tar", "part1/deep/c.TAR", "part2/b.tar"]
    assert tars(link).names() == expected
    for name, target in (("part2/up", "../.."), ("part2/self", "."), ("again", "part2"), ("above", "../..")):
        (link / name).symlink_to(target)
    (tmp_path / "store/back").symlink_to(link)
    (tmp_path / "store/deep/twice").symlink_to("..")
    assert tars(link).names() == expected
    assert read_all(tars(link))["part1/a.tar"] == "store/a.tar"
    (link / "part3").symlink_to("part2")
    assert "the same file as" in refusal(tars(link / "part*").names)
    (link / "part3").unlink()
    (link / "part3").symlink_to("nowhere")
    assert "part3: a link that leads nowhere" in refusal(tars(link).names)
    (link / "part3").unlink()


def test_bad_paths_are_refused_in_one_line(tmp_path: Path) -> None:
    touch(tmp_path, "empty/readme.txt", "file.txt", "w/1.tar")
    assert "none given" in refusal(tars)
    assert "no such folder" in refusal(tars(tmp_path / "none").names)
    assert "no .tar files" in refusal(tars(tmp_path / "empty").names)
    assert "no .tar files" in refusal(tars(tmp_path / "*.tar").names)
    assert "not a .tar file" in refusal(tars(tmp_path / "file.txt").names)
    assert "more than 1,000,000" in refusal(tars("{0..99999999}.tar").names)
    assert "more than 1,000,000" in refusal(tars("{0..9999}/{0..9999}.tar").names)
    for path in ("ftp://host/a.tar", "file:///etc/passwd", "memory://a.tar", "simplecache::http://host/a.tar"):
        assert "is not read" in refusal(lambda path=path: tars(path)), path
    assert "cannot list" in refusal(lambda: tars("http://host/*.tar"))
    assert "cannot list" in refusal(tars("http://host/folder").names)
    assert "no such file" in refusal(lambda: remote.fetched(str(tmp_path / "w/2.tar")))
    os.mkfifo(tmp_path / "fifo.tar")
    assert "not a regular file" in refusal(lambda: remote.fetched(str(tmp_path / "fifo.tar")))
    if os.geteuid() != 0:
        (tmp_path / "w").chmod(0)
        assert "cannot list" in refusal(tars(tmp_path / "w").names)


def test_a_pipe_runs_only_where_it_is_allowed(tmp_path: Path) -> None:
    touch(tmp_path, "1.tar", "2.tar")
    mark = tmp_path / "ran"
    command = f"pipe:touch {mark}; cat {tmp_path}/{{1..2}}.tar"
    assert "--option allow_pipe=true" in refusal(lambda: tars(command))
    assert not mark.exists()
    assert read_all(tars(command, allow_pipe=True)) == {"1.tar": "1.tar", "2.tar": "2.tar"}
    assert mark.exists()
    assert "names no .tar file" in refusal(tars("pipe:cat", allow_pipe=True).names)
    assert "ended with status 3" in refusal(lambda: remote.fetched("pipe:exit 3 1.tar"))


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """fsspec's file system in memory, in the place of s3 and gs."""
    fsspec = pytest.importorskip("fsspec")
    monkeypatch.setattr(patterns, "PROTOCOLS", (*remote.PROTOCOLS, "memory"))
    filesystem = fsspec.filesystem("memory")
    for name in ("web/1.tar", "web/2.tar", "web/2.json", "web/deep/3.tar", "x.y/1.tar"):
        filesystem.pipe(f"/bucket/{name}", name.encode())
    yield
    filesystem.rm("/bucket", recursive=True)


@pytest.mark.usefixtures("memory")
def test_a_store_that_can_be_listed() -> None:
    web = "memory://bucket/web"
    assert read_all(tars(web)) == {name: f"web/{name}" for name in ("1.tar", "2.tar", "deep/3.tar")}
    assert read_all(tars(f"{web}/{{1..2}}.tar")) == read_all(tars(f"{web}/*.tar"))
    assert sorted(read_all(tars(f"{web}/*.tar"))) == ["1.tar", "2.tar"]
    assert read_all(tars("memory://bucket/x.y")) == {"1.tar": "x.y/1.tar"}
    urls = [f"{web}/{name}" for name in ("1.tar", "9.tar", "2.tar")]
    assert remote.existing(urls) == [urls[0], urls[2]]
    assert "no such file" in refusal(lambda: remote.fetched(f"{web}/9.tar"))


def test_the_missing_library_of_a_protocol_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec = pytest.importorskip("fsspec")

    def missing(_: str) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    assert 'pip install "igpt-ds[remote]"' in refusal(lambda: remote.fetched("s3://bucket/a.tar"))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, dict[str, bytes], Counter[str]]]:
    """An http server of a dictionary of files; /flaky fails twice, /broken always, and requests are counted."""
    pytest.importorskip("aiohttp")
    pytest.importorskip("fsspec")
    monkeypatch.setattr(remote.time, "sleep", lambda _: None)
    content: dict[str, bytes] = {}
    asked: Counter[str] = Counter()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, *, body: bool) -> None:
            name = self.path.strip("/")
            asked[name] += 1
            if name.startswith("sent-to-"):
                self.send_response(302)
                self.send_header("Location", name.removeprefix("sent-to-"))
                self.end_headers()
            elif name not in content:
                self.send_error(404)
            elif name.startswith("broken") or (name.startswith("flaky") and asked[name] <= 4):
                self.send_error(503)
            else:
                data = content[name]
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if body:
                    self.wfile.write(data[:-1] if name.startswith("cut") else data)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{running.server_address[1]}", content, asked
        running.shutdown()
        thread.join(timeout=5)


def test_http(server: tuple[str, dict[str, bytes], Counter[str]]) -> None:
    url, content, asked = server
    content.update({f"{i:03d}.tar": b"%03d" % i for i in (1, 2, 4)})
    given = tars(f"{url}/{{001..004}}.tar")
    assert given.names() == ["001.tar", "002.tar", "003.tar", "004.tar"]
    urls = [given.url(name) for name in given.names()]
    assert remote.existing(urls) == [urls[0], urls[1], urls[3]]
    with remote.fetched(urls[3]) as file:
        assert file.read() == b"004"
    assert "no such file" in refusal(lambda: remote.fetched(urls[2]))
    content.update({"flaky.tar": b"came", "broken.tar": b"", "cut.tar": b"1234"})
    with remote.fetched(f"{url}/flaky.tar") as file:
        assert file.read() == b"came"
    # A server that fails must not look like a file that is not there: its images would be left out in silence.
    assert "cannot be read" in refusal(lambda: remote.existing([f"{url}/broken.tar"]))
    assert "cannot be read" in refusal(lambda: remote.fetched(f"{url}/broken.tar"))
    assert "cannot be read" in refusal(lambda: remote.fetched(f"{url}/cut.tar"))
    assert asked["cut.tar"] >= 3
    # Each look is tried again, the first one, too; what is not there, or not for us, is asked for once.
    content["flaky-look.tar"] = b""
    assert remote.existing([f"{url}/flaky-look.tar"]) == [f"{url}/flaky-look.tar"]
    content["flaky-open.tar"] = b"came"
    with remote.opened(f"{url}/flaky-open.tar") as file:
        assert file.read() == b"came"
    asked.clear()
    assert remote.existing([f"{url}/none.tar"]) == []
    assert asked["none.tar"] <= 2
    assert "cannot be read" in refusal(lambda: remote.fetched("http://127.0.0.1:9/a.tar"))


def test_a_public_server_cannot_send_to_private_addresses(
    server: tuple[str, dict[str, bytes], Counter[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, content, asked = server
    content["1.tar"] = b"one"
    with remote.fetched(f"{url}/sent-to-/1.tar") as file:  # from a private server to itself
        assert file.read() == b"one"
    for host in ("127.0.0.1", "localhost", "10.0.0.1", "169.254.169.254", "[::1]", "[fe80::1]"):
        assert not remote._is_public(host.strip("[]"))
    assert remote._is_public("8.8.8.8")
    asked.clear()
    monkeypatch.setattr(remote, "_is_public", lambda host: host == "127.0.0.1")
    target = url.replace("127.0.0.1", "localhost")
    told = refusal(lambda: remote.fetched(f"{url}/sent-to-{target}/1.tar"))
    assert (
        told
        == f"{url}/sent-to-{target}/1.tar: leads to {target}/1.tar, which is not of the internet: give that URL itself"
    )
    assert not asked["1.tar"]


def test_class_names(tmp_path: Path) -> None:
    path = tmp_path / "names.txt"
    path.write_text("cat\n großer Hund \n", encoding="utf-8")
    assert read_classes(str(path)) == ["cat", "großer Hund"]
    path.write_bytes("\ufeffcat\r\nnight\u2028owl\r\n".encode())
    assert read_classes(str(path)) == ["cat", "night\u2028owl"]
    for text, told in (("", "empty"), ("a\n\nb\n", "line 2: an empty name"), ("a\nb\na\n", "line 3")):
        path.write_text(text)
        assert told in refusal(lambda: read_classes(str(path)))
    path.write_bytes(b"\xff\xfe")
    assert "not the text" in refusal(lambda: read_classes(str(path)))
    assert "no such file" in refusal(lambda: read_classes(str(tmp_path / "none")))
