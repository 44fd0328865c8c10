"""Locks: one process at a time makes what is in a folder, and who waits is told for whom."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from tunediff.core.disk import make_folder, unwritable
from tunediff.core.progress import tell

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

NONE = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
"""Error numbers of a file system that has no locks."""


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold the lock of `folder`, which need not exist, in the file ``.NAME.lock`` beside it; wait for whoever holds it.

    The system frees a lock when its process ends, however it ends. Where a file system has no locks, and on Windows,
    the work goes on without one: then two processes may do the same work, and each writes whole files all the same.
    Raises `ArtifactError` where nothing can be written.
    """
    path = folder.with_name(f".{folder.name}.lock")
    number = _taken(path)
    try:
        yield
    finally:
        if number is not None:
            _remove(path, number)
            os.close(number)


def sweep(folder: Path) -> None:
    """Remove the locks in `folder` and below whose processes are dead; on a read-only disk they stay."""
    for path in list(folder.glob("**/.*.lock")):
        with contextlib.suppress(OSError):
            number = os.open(path, os.O_RDWR)
            try:
                if fcntl is not None:
                    fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    _remove(path, number)
            finally:
                os.close(number)


def _remove(path: Path, number: int) -> None:
    """Remove a lock while it is held: who waits for it sees that it is gone, and makes another."""
    with contextlib.suppress(OSError):
        if _is(path, number):
            path.unlink()


def _is(path: Path, number: int) -> bool:
    try:
        return os.path.samestat(os.fstat(number), path.stat())
    except FileNotFoundError:  # asked of the file itself: between two questions another process may remove it
        return False


def _taken(path: Path) -> int | None:
    """Take the lock, and return the number of its open file; None where there are no locks."""
    if fcntl is None:
        return None
    make_folder(path.parent)
    while True:
        try:
            number = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise unwritable(path, error) from None
        try:
            try:
                fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                tell(f"waiting for {_holder(path)}, which makes {path.parent / path.name[1:-5]}")
                fcntl.flock(number, fcntl.LOCK_EX)
            if _is(path, number):
                _sign(number)
                return number
        except OSError as error:
            os.close(number)
            if error.errno not in NONE:
                raise unwritable(path, error) from None
            tell(f"{path.parent} is on a file system without locks: two processes may do the same work twice")
            return None
        except BaseException:  # an interrupt while waiting
            os.close(number)
            raise
        os.close(number)


def _sign(number: int) -> None:
    """Write into the lock who holds it; where the disk is full it goes unsigned."""
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    with contextlib.suppress(OSError):
        os.ftruncate(number, 0)
        os.write(number, json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since}).encode())


def _holder(path: Path) -> str:
    try:
        held = json.loads(path.read_text())
        return f"process {held['pid']} on {held['host']} (since {held['since']})"
    except (OSError, ValueError, LookupError, TypeError):
        return "another process"
