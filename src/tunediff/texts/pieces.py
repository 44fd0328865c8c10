"""Pieces: a long text cut at its blank lines, else at its lines, else at its spaces."""

from __future__ import annotations

import re
from collections.abc import Iterator

WHOLE_CHARACTERS = 20_000
"""Longest text, paragraph or line that is kept whole, in characters."""
PIECE_CHARACTERS = 2_000
"""About how long a document is that is cut from a longer text, in characters."""
STRIP = re.compile(rf"(?s).{{1,{PIECE_CHARACTERS}}}(?:\s|\Z)|.{{{PIECE_CHARACTERS}}}")
"""The next part of a very long line: up to a space where there is one."""


def pieces(text: str) -> Iterator[str]:
    """Yield a text whole if it is short enough, and else cut into pieces of about `PIECE_CHARACTERS` characters.

    Blank lines between pieces are lost, and no other text. What has no blank line for `WHOLE_CHARACTERS` characters is
    cut at the ends of its lines, and a line of that length at its spaces.
    """
    if len(text) <= WHOLE_CHARACTERS:
        yield text
        return
    piece: list[str] = []
    size = 0
    for gap, unit in _units(text):
        if piece and size + len(unit) > PIECE_CHARACTERS:
            yield "".join(piece)
            piece, size = [], 0
        piece += [gap, unit] if piece else [unit]
        size += len(unit)
    if piece:
        yield "".join(piece)


def _units(text: str) -> Iterator[tuple[str, str]]:
    """(what stands before it, text) of each part that is not cut further."""
    for paragraph in re.split(r"\n(?:[ \t]*\n)+", text):
        lines = [paragraph] if len(paragraph) <= WHOLE_CHARACTERS else paragraph.split("\n")
        for place, line in enumerate(lines):
            gap = "\n" if place else "\n\n"
            for part in [line] if len(line) <= WHOLE_CHARACTERS else STRIP.findall(line):
                if part.strip():
                    yield gap, part
                gap = ""
