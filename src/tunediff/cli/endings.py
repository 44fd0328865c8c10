"""How a command ends: what is told of the error that ended it, and the exit code that stands for it."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Callable

import typer

from tunediff.core.errors import TunediffError, first_line
from tunediff.core.text import visible

FOUND, FAILED, FAULTY, STOPPED, UNREAD = 1, 2, 3, 130, 141
"""Exit codes: a change was confirmed (``--exit-code`` only), an error that the user can act on, a fault of tunediff, an
interrupt, nobody read the output any more. No error gives 1."""
MEMORY = (
    "--set rank.batch_tokens=300 --set contrast.batch=4 --set harvest.batch_tokens=300, or --set harvest.store=none, or "
    "--set pair.dtype=bfloat16"
)
"""What lowers the memory of a run."""


def code_of(command: Callable[[], int | None]) -> int:
    """Run a command, tell what ended it on stderr in four lines at most, and return the exit code."""
    try:
        _refuse_bytes(sys.argv)
        code = command() or 0
        sys.stdout.flush()
        return _told(KeyboardInterrupt()) if code == STOPPED else code  # what typer makes of Ctrl-C
    except BaseException as error:
        # As `| head` does; typer makes an exit of it.
        if isinstance(error, BrokenPipeError) or isinstance(error.__context__, BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python would complain again when it closes the stream
            return UNREAD
        return _told(error)


def _refuse_bytes(arguments: list[str]) -> None:
    """Raise `TunediffError` for an argument that is no text, since no file that a run writes could hold it."""
    for argument in arguments[1:]:
        try:
            argument.encode()
        except UnicodeEncodeError:
            raise _no_text("an argument", argument) from None


def _no_text(what: str, text: str) -> TunediffError:
    shown = text.encode(errors="backslashreplace").decode()[:200]
    remedy = "rename it, or name a symbolic link to it"
    return TunediffError(f"{what} is not text", expected="UTF-8", got=shown, remedy=remedy)


def _told(error: BaseException) -> int:
    if isinstance(error, (typer.Abort, KeyboardInterrupt)):
        typer.echo("stopped; run the same command again to go on", err=True)
        return STOPPED
    if hasattr(error, "show") and hasattr(error, "exit_code"):  # usage, of typer's click or of click's own
        error.show()
        return FAILED
    known = error if isinstance(error, TunediffError) else of_machine(error)
    if known is not None:
        typer.echo("error: " + "\n".join(map(visible, known.lines())), err=True)
        return FAILED
    if os.environ.get("TUNEDIFF_DEBUG"):
        traceback.print_exception(error)
        return FAULTY
    typer.echo(
        f"error: {type(error).__name__}: {visible(first_line(error, 300))}\n"
        "  expected: no such error; this is a fault in tunediff\n  try: TUNEDIFF_DEBUG=1 shows where it happened",
        err=True,
    )
    return FAULTY


def of_machine(error: BaseException) -> TunediffError | None:
    """What the machine refused, as an error that the user can act on; None for an error of another kind."""
    first = first_line(error, None)
    low = first.lower()
    if isinstance(error, MemoryError) or "can't allocate memory" in low or "out of memory" in low:
        return TunediffError("there is not enough memory", expected="memory for the run", got=first, remedy=MEMORY)
    full = "no space left on device" in low or "disk quota exceeded" in low
    if full or (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)):
        return TunediffError(
            "the disk is full", got=first, remedy="free space, and run the same command again; it goes on"
        )
    if isinstance(error, UnicodeEncodeError):
        return _no_text("a name", str(error.object))
    if isinstance(error, OSError):
        place = error.filename if isinstance(error.filename, (str, bytes, os.PathLike)) else ""
        what = f"{os.fsdecode(place)} cannot be used" if place else "a file or connection cannot be used"
        return TunediffError(
            what, got=error.strerror or first, remedy="check the path and who may read and write there"
        )
    return None
