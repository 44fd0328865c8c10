"""Files from elsewhere: read only if they are ordinary ones, since a pipe or a device may never end."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from tunediff.core.errors import TunediffError

KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
    stat.S_IFDIR: "a folder",
}
"""What a path may be besides an ordinary file."""


def read_bytes(path: Path | str, error: type[TunediffError], expected: str) -> bytes:
    """The bytes of an ordinary file; raises `error` for one that is missing, cannot be read or is of another kind.

    What is opened is what is checked, and opening a pipe does not wait for who writes it.
    """
    try:
        with open(path, "rb", opener=_without_waiting) as file:
            kind = stat.S_IFMT(os.fstat(file.fileno()).st_mode)
            if kind != stat.S_IFREG:
                raise error(f"{path} is no ordinary file", expected=expected, got=KINDS.get(kind, "something else"))
            return file.read()
    except FileNotFoundError:
        raise error(f"{path} does not exist", expected=expected) from None
    except ValueError:
        raise error(f"{str(path)!r} is not a path", expected=expected, got="a null character") from None
    except OSError as fault:
        got = KINDS[stat.S_IFDIR] if isinstance(fault, IsADirectoryError) else fault.strerror or str(fault)
        raise error(f"{path} cannot be read", expected=expected, got=got) from None


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def refuse_special(folder: Path, error: type[TunediffError]) -> None:
    """Raise `error` if a file right inside `folder` is a pipe, device or socket: whoever opens it may wait for ever."""
    for path in sorted(folder.iterdir()):
        try:
            kind = stat.S_IFMT(path.stat().st_mode)
        except OSError:  # a link to nowhere, which its reader tells
            continue
        if kind not in (stat.S_IFREG, stat.S_IFDIR):
            raise error(
                f"{path} is no ordinary file", expected="files and folders", got=KINDS.get(kind, "something else")
            )
