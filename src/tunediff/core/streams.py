"""Streams to a terminal: whatever is written to them, by this package or another, cannot steer it."""

from __future__ import annotations

import contextlib
import io
import re
import sys
from collections.abc import Iterator
from typing import TextIO, cast

from tunediff.core.text import visible

STYLE = re.compile(r"\x1b\[[0-9;]*m")
"""A code that styles what follows it, as other libraries write without looking where to."""


class Shown(io.TextIOBase):
    """A text stream that passes on what is written to it without styles, and with hidden and steering characters written
    out (`visible`).

    It says that it is no terminal, so that other libraries write no colors. A carriage return that begins a text is
    kept on a terminal, since it rewrites a line of progress.
    """

    def __init__(self, raw: TextIO):
        self.raw = raw

    def write(self, text: str) -> int:
        if not isinstance(text, str):
            raise TypeError(f"text is wanted, got {type(text).__name__}")
        rewrites = text.startswith("\r")
        start = "\r" if rewrites and self.raw.isatty() else ""
        self.raw.write(start + visible(STYLE.sub("", text[rewrites:].replace("\r\n", "\n"))))
        return len(text)

    def flush(self) -> None:
        self.raw.flush()

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.raw.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """The encoding of the stream below."""
        return getattr(self.raw, "encoding", None) or "utf-8"


@contextlib.contextmanager
def shown() -> Iterator[None]:
    """Inside, stdout and stderr are `Shown`; what they cannot encode is written as escapes."""
    before = sys.stdout, sys.stderr
    for stream in before:
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    sys.stdout, sys.stderr = (cast(TextIO, Shown(stream)) for stream in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def terminal(stream: TextIO) -> TextIO:
    """The terminal behind a stream, for who writes out hidden characters itself; the stream where there is none."""
    raw = stream.raw if isinstance(stream, Shown) else stream
    return raw if raw.isatty() else stream
