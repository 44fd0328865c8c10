"""The disk: files are written whole or not at all, under temporary names of their own, and hashed once in a process."""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import os
import re
import secrets
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from tunediff.core.errors import ArtifactError, TunediffError

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""Error numbers of a disk, quota or file size limit that is used up."""
SPACE = "free space, or choose another folder, and run again; it resumes"
"""What to try on a full disk."""
PARTIAL = re.compile(r"\..+\.(?P<host>[0-9a-f]{8})-(?P<pid>[0-9]+)-[0-9a-f]{8}\.partial")
"""Names of what is being written: by which process of which host, and a random part."""

_hashes: dict[tuple[int, ...], str] = {}


def _host() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def partial_of(path: Path) -> Path:
    """A name beside `path` that no other process uses, for what becomes `path` when it is whole."""
    name = path.name.encode()[:120].decode(errors="ignore")  # a file's name has 255 bytes at most
    return path.with_name(f".{name}.{_host()}-{os.getpid()}-{secrets.token_hex(4)}.partial")


def sweep(folder: Path, pattern: str = "**/.*.partial") -> None:
    """Remove what processes of this host that are dead were writing in `folder`; what else is there stays.

    On a disk that is read-only everything stays.
    """
    for path in list(folder.glob(pattern)):
        match = PARTIAL.fullmatch(path.name)
        if match and match["host"] == _host() and not _lives(int(match["pid"])):
            with contextlib.suppress(OSError):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True


def unwritable(path: Path, error: Exception, space: int = 0) -> ArtifactError:
    """The error for a file or folder that could not be written; `space` is the number of bytes that it takes."""
    number = error.errno if isinstance(error, OSError) else None
    full = number in FULL or any(f"os error {known})" in str(error) for known in FULL)
    return ArtifactError(
        f"{path} could not be written",
        expected=(f"{space:,} bytes of space" if space else "space on the disk") if full else "a writable folder",
        got=(error.strerror if isinstance(error, OSError) else None) or str(error),
        remedy=SPACE if full else "choose another folder",
    )


def make_folder(folder: Path) -> None:
    """Make a folder and those above it where they are missing; raises `ArtifactError` where that is not possible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(folder, error) from None


def write_bytes(path: Path, data: bytes, sha256: str = "") -> None:
    """Write `data` atomically: to a temporary file in the same folder, flushed to disk, then renamed to `path`.

    sha256   the data's hash, where it is known

    Raises `ArtifactError` when the disk is full or the folder is not writable; `path` is then unchanged.
    """
    partial = partial_of(path)
    make_folder(path.parent)
    try:
        with open(partial, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            ours = os.fstat(file.fileno()).st_ino
        os.replace(partial, path)
        _flush(path.parent)
        stat = path.stat()
        if stat.st_ino == ours:  # else another process has written it since
            _hashes[_identity(stat)] = sha256 or hashlib.sha256(data).hexdigest()
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()  # a half-written file would keep a full disk full
        raise unwritable(path, error, len(data)) from None


def update_bytes(path: Path, data: bytes) -> None:
    """Write `data` atomically unless `path` holds it already, as on a read-only disk where all is done."""
    try:
        same = path.read_bytes() == data
    except OSError:
        same = False
    if not same:
        write_bytes(path, data)


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `out` on leaving: whole, or not at all if anything is raised inside.

    `out` is an empty folder or does not exist. Raises `ArtifactError` if the folder cannot be written.
    """
    out = out.resolve()
    partial = partial_of(out)
    make_folder(out.parent)
    sweep(out.parent, f".{glob.escape(out.name)}.*.partial")
    try:
        with writing(out):
            partial.mkdir()
            yield partial
            for path in [*partial.rglob("*"), partial]:
                _flush(path)
            os.replace(partial, out)
            _flush(out.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """What other libraries raise inside, because `path` cannot be written, as `ArtifactError`."""
    try:
        yield
    except TunediffError:
        raise
    except Exception as error:
        # Libraries in other languages raise errors of their own for a full disk, with the system's number as text.
        if isinstance(error, OSError) or "os error" in str(error):
            raise unwritable(path, error) from error
        raise


def _flush(path: Path) -> None:
    """Have a file's bytes, or a folder's names, on the disk; some systems know no such thing of folders."""
    with contextlib.suppress(PermissionError, IsADirectoryError):
        number = os.open(path, os.O_RDONLY)
        try:
            os.fsync(number)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EBADF):
                raise
        finally:
            os.close(number)


def hash_file(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hex; a file that stays as it is is read once in a process."""
    with open(path, "rb") as file:
        identity = _identity(os.fstat(file.fileno()))
        if identity not in _hashes:
            _hashes[identity] = hashlib.file_digest(file, "sha256").hexdigest()
    return _hashes[identity]


def _identity(stat: os.stat_result) -> tuple[int, ...]:
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns
