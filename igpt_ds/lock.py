"""One living owner of a directory: a lock file that names host, process and start, and is touched while its owner
lives.

It needs no flock, which network file systems may lack: the file appears by a hard link, which only one can make. A dead
owner's lock is taken over. On the same machine the system knows whether the owner lives. Of another machine the file's
time must stand still: it is compared with the time of a file made beside it, since clocks differ. Whoever publishes
asks `require` first: a process that was suspended may have lost its lock meanwhile.
"""

import contextlib
import errno
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from igpt_ds.atomic import writing
from igpt_ds.errors import RunError, UserError
from igpt_ds.reading import parse_json

NAME = ".lock"
_BEAT = 10.0  # seconds between two touches
_STALE = 90.0  # seconds without one after which an owner on another machine is dead


@dataclass(frozen=True)
class Owner:
    """A process: pid and start (clock ticks since boot), of which machine, boot and container; `token` is its own.

    Attributes:
        directory: the number of the directory's inode: a copy of the directory is another one, and not owned.
    """

    host: str
    machine: str
    directory: int
    pid: int
    born: int
    since: str
    token: str


class Lock:
    """A lock that this process holds from `take` on until `release`, or until it ends.

    Attributes:
        path: the lock file.
        token: what `require` compares, in this process and in those it starts.
    """

    def __init__(self, path: Path, token: str):
        self.path, self.token = path, token
        self._released = threading.Event()
        threading.Thread(target=self._beat, name="lock", daemon=True).start()

    @classmethod
    def take(cls, directory: Path) -> "Lock":
        """Become the owner of a directory, which must exist.

        Waits for up to a minute and a half where the owner is on another machine and may be dead.

        Raises:
            UserError: another process owns it.
        """
        path = directory / NAME
        mine = Owner(
            socket.gethostname(),
            _machine(),
            directory.stat().st_ino,
            os.getpid(),
            born(os.getpid()) or 0,
            time.strftime("%F %T %z"),
            secrets.token_hex(8),
        )
        with writing(path), _written_beside(path, mine) as written:
            while not _linked(written, path):
                other = read(path)
                if other is not None and _lives(path, other):
                    raise UserError(
                        f"{directory}: in use by process {other.pid} on {other.host} since {other.since}: "
                        "wait for its end, or stop it"
                    )
                if other is None and _young(path):
                    time.sleep(_BEAT / 50)  # it is just being written
                else:
                    _remove_dead(path, other)
        return cls(path, mine.token)

    def require(self) -> None:
        """See `require`."""
        require(self.path, self.token)

    def release(self) -> None:
        """Give the directory free; a lock that was lost stays as it is."""
        self._released.set()
        owner = read(self.path)
        if owner is not None and owner.token == self.token:
            with contextlib.suppress(OSError):
                self.path.unlink()

    def _beat(self) -> None:
        while not self._released.wait(_BEAT):
            with contextlib.suppress(OSError):  # a full or absent file system is told of elsewhere
                owner = read(self.path)
                if owner is not None and owner.token == self.token:
                    os.utime(self.path)


def require(path: Path, token: str) -> None:
    """Ask, before something is published, whether the lock is still that of `token`.

    Raises:
        RunError: another process has taken it over, or somebody has deleted it.
    """
    owner = read(path)
    if owner is None or owner.token != token:
        by = f"process {owner.pid} on {owner.host}" if owner else "nobody: the lock was deleted"
        raise RunError(f"{path.parent}: this process owns it no longer, but {by}: nothing more is written")


def read(path: Path) -> Owner | None:
    """Whom a lock names; None where there is none, or it is no lock."""
    try:
        # Opened anew each time: network file systems look at the server then.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(descriptor, encoding="utf-8") as file:
            fields = parse_json(file.read(4096))
        owner = Owner(**fields)
        numbers = ("directory", "pid", "born")
        whole = all(type(value) is (int if name in numbers else str) for name, value in fields.items())
    except (OSError, ValueError, TypeError):
        return None
    return owner if whole else None


def born(pid: int) -> int | None:
    """When a living process of this machine started, clock ticks since boot; None of a dead one, or if not known."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else int(fields[19])
    except (OSError, IndexError, ValueError):
        return None


def _machine() -> str:
    """This boot of this machine, seen from this container: where process ids mean the same."""
    parts = []
    for read_part in (
        lambda: Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        lambda: str(Path("/proc/self/ns/pid").readlink()),
    ):
        try:
            parts.append(read_part())
        except OSError:
            parts.append(socket.gethostname())
    return " ".join(parts)


def _lives(path: Path, owner: Owner) -> bool:
    if owner.directory != path.parent.stat().st_ino:
        return False
    if owner.machine == _machine():
        return born(owner.pid) == owner.born
    # Another machine's: it lives if its time is seen to move, or is young and then moves.
    begin = time.monotonic()
    first = _age_and_time(path)
    while first is not None and first[0] < _STALE and time.monotonic() - begin < _STALE:
        time.sleep(min(1.0, _BEAT / 4))
        now = _age_and_time(path)
        if now is not None and now[1] != first[1]:
            return True
        if now is None:
            return False
    return False


def _age_and_time(path: Path) -> tuple[float, float] | None:
    """Seconds since the lock was touched, by the file system's own clock, and when that was; None: it is gone."""
    probe = path.with_name(f"{NAME}.{secrets.token_hex(8)}.time")
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            touched = os.fstat(descriptor).st_mtime
        finally:
            os.close(descriptor)
    except OSError:
        return None
    try:
        with open(probe, "xb") as file:
            return os.fstat(file.fileno()).st_mtime - touched, touched
    finally:
        probe.unlink(missing_ok=True)


@contextlib.contextmanager
def _written_beside(path: Path, owner: Owner) -> Iterator[Path]:
    written = path.with_name(f"{NAME}.{owner.token}")
    try:
        with open(written, "x", encoding="utf-8") as file:
            json.dump(asdict(owner), file)
            file.flush()
            os.fsync(file.fileno())
        yield written
    finally:
        written.unlink(missing_ok=True)


def _linked(written: Path, path: Path) -> bool:
    try:
        os.link(written, path)
    except FileExistsError:
        # Over a network a link's answer may be lost, and it asked for again.
        with contextlib.suppress(OSError):
            return written.samefile(path)
        return False
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        # A file system without hard links.
        try:
            with open(path, "x", encoding="utf-8") as file:
                file.write(written.read_text(encoding="utf-8"))
        except FileExistsError:
            return False
    return True


def _young(path: Path) -> bool:
    seen = _age_and_time(path)
    return seen is not None and seen[0] < _BEAT


def _remove_dead(path: Path, dead: Owner | None) -> None:
    """Take a dead owner's lock away, unless another process has done so, and become the owner, meanwhile."""
    away = path.with_name(f"{NAME}.{secrets.token_hex(8)}.dead")
    try:
        os.rename(path, away)
    except FileNotFoundError:
        return
    found = read(away)
    if found is not None and found != dead:
        # It was a new, living one: put it back. Its owner's name stands in it; who came between holds another.
        with contextlib.suppress(OSError):
            os.link(away, path)
    away.unlink(missing_ok=True)
