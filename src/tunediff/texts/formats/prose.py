"""Plain text: a short file is one document, a longer one is cut at its blank lines."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from tunediff.core.errors import SourceError
from tunediff.texts.files import File
from tunediff.texts.formats.base import Format, Row
from tunediff.texts.pieces import PIECE_CHARACTERS, WHOLE_CHARACTERS, pieces


class Prose(Format):
    """Plain text."""

    suffixes: ClassVar[tuple[str, ...]] = (".txt", ".text", ".md", ".markdown", ".rst")
    is_text = True

    def rows(self, file: File) -> Iterator[Row]:
        if file.is_sampled(WHOLE_CHARACTERS):
            yield from self._passages(file)
            return
        text = "".join(line.text for line in file.lines(sampled=False) if _read(line.fault))
        cut = list(pieces(text))
        if len(cut) == 1:
            yield Row("", "", text)
        else:
            yield from (Row(str(number), f"piece {number + 1}", piece) for number, piece in enumerate(cut))

    def _passages(self, file: File) -> Iterator[Row]:
        """Consecutive lines, up to the length of a piece, from places all over the file."""
        some: list[str] = []
        key, block, size = "", 0, 0
        for line in file.lines(each=WHOLE_CHARACTERS):
            if some and (size > PIECE_CHARACTERS or line.block != block or line.fault):
                yield Row(key, key, "".join(some))
                some, size = [], 0
            if line.fault:
                yield Row(line.key, line.where, fault=line.fault)
                continue
            key, block = key if some else line.key, line.block
            some.append(line.text)
            size += len(line.text)
        if some:
            yield Row(key, key, "".join(some))


def _read(fault: SourceError | None) -> bool:
    if fault:
        raise fault
    return True


VARIANT = Prose
