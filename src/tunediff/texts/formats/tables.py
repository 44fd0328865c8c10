"""CSV and TSV: a record a row, its columns named by the first."""

from __future__ import annotations

import csv
from collections.abc import Iterator

from tunediff.core.errors import SourceError
from tunediff.texts import files
from tunediff.texts.files import File
from tunediff.texts.formats.base import Format, Row

DELIMITERS = {".tsv": "\t", ".tab": "\t"}
"""Suffixes whose files have one delimiter; in others it is the one of the header."""


class Tables(Format):
    """Comma- or tab-separated values."""

    suffixes = (".csv", ".tsv", ".tab")

    def rows(self, file: File) -> Iterator[Row]:
        csv.field_size_limit(max(csv.field_size_limit(), files.MAX_DOCUMENT_BYTES))
        lines = (line.text for line in file.lines(sampled=False) if _read(line))
        header = file.head.decode(file.encoding, errors="ignore").lstrip("\ufeff").split("\n", 1)[0]
        delimiter = DELIMITERS.get(file.suffix) or max(",;\t|", key=header.count)
        reader = csv.reader(lines, delimiter=delimiter)
        number = -1
        columns: list[str] = []
        try:
            for number, cells in enumerate(reader, -1):
                where = f"line {reader.line_num}"
                if number < 0:
                    columns = [cell.strip() for cell in cells]
                elif len(cells) > len(columns):
                    fault = SourceError(
                        f"{file.path}, {where} has more cells than the header",
                        expected=f"{len(columns)} cells",
                        got=f"{len(cells)} cells",
                    )
                    yield Row(str(number), where, fault=fault)
                elif cells:
                    yield Row(str(number), where, {name: cell or None for name, cell in zip(columns, cells)})
        except csv.Error as error:
            # What follows would be lost without a count.
            raise SourceError(f"{file.path}, line {reader.line_num} is no row of a table", got=str(error)) from None


def _read(line: files.Line) -> bool:
    if line.fault:
        raise line.fault
    return True


VARIANT = Tables
