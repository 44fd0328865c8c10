"""Parquet: a record a row; only columns that may hold text are read, from row groups all over a file that is too large."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tunediff.core.errors import MissingExtraError, SourceError, first_line
from tunediff.texts.files import FAULTS, File
from tunediff.texts.formats.base import Format, Row

BATCH_ROWS = 256
"""Rows that are read at a time."""
MOST_PACKED = 200
"""How many times smaller than a text its compressed form may be."""


class Parquet(Format):
    """Parquet."""

    suffixes = (".parquet", ".pq")

    def rows(self, file: File) -> Iterator[Row]:
        _, parquet = arrow(file)
        try:
            # Texts that repeat stay written once: a small file may say very much very often.
            with parquet.ParquetFile(file.path, memory_map=True) as plain:
                names, leaves = text_columns(plain.schema_arrow, file), _leaves(plain)
            with parquet.ParquetFile(file.path, read_dictionary=leaves, memory_map=True) as opened:
                yield from self._rows(file, opened, names)
        except FAULTS as error:
            raise SourceError(f"{file.path} is not a whole Parquet file", got=first_line(error)) from None

    def _rows(self, file: File, opened: Any, names: list[str]) -> Iterator[Row]:
        groups = [opened.metadata.row_group(number) for number in range(opened.metadata.num_row_groups)]
        sizes = [_size(group, names) for group in groups]
        starts = [sum(group.num_rows for group in groups[:number]) for number in range(len(groups))]
        share = file.share
        part = min(1.0, share.bytes / max(1, sum(sizes)), share.documents / max(1, opened.metadata.num_rows))
        count = max(1, round(part * len(groups)))
        chosen = [len(groups) * (2 * place + 1) // (2 * count) for place in range(count)] if groups else []
        share.cut |= part < 1
        for place, number in enumerate(chosen):
            if sizes[number] > share.bytes and _swells(groups[number], names, share.bytes):
                fault = SourceError(
                    f"{file.path}, row group {number + 1} is too large",
                    got=f"{sizes[number]:,} bytes",
                    expected=f"at most {share.bytes:,}",
                )
                yield Row(str(starts[number]), f"row {starts[number] + 1}", fault=fault)
                continue
            until = share.bytes * (place + 1) // count
            most = max(1, share.documents // count)
            batches = opened.iter_batches(batch_size=BATCH_ROWS, row_groups=[number], columns=names)
            for row in records(batches, starts[number]):
                share.take(length(row.value))
                yield row
                if share.taken >= until or int(row.key) - starts[number] + 1 >= most:
                    share.cut |= int(row.key) - starts[number] + 1 < groups[number].num_rows
                    break


def arrow(file: File) -> tuple[Any, Any]:
    """The modules pyarrow and pyarrow.parquet; raises MissingExtraError without them."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MissingExtraError(
            f"{file.path} needs pyarrow to be read", remedy="pip install 'tunediff[parquet]'"
        ) from None
    return pyarrow, pyarrow.parquet


def text_columns(schema: Any, file: File) -> list[str]:
    """The columns that may hold text, names or numbers; the others are counted as left out."""
    names = [field.name for field in schema if _is_plain(field.type)]
    for field in schema:
        if field.name not in names:
            file.remarks.add(
                f"columns of {field.type} left out".replace("\n", " ")[:80], f"{field.name} of {file.path}"
            )
    return names


def _is_plain(kind: Any) -> bool:
    """Whether a type holds text or numbers and nothing else, at any depth."""
    from pyarrow import types

    if types.is_dictionary(kind):
        return _is_plain(kind.value_type)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _is_plain(kind.value_type)
    if types.is_struct(kind):
        return all(_is_plain(kind.field(number).type) for number in range(kind.num_fields))
    text = types.is_string(kind) or types.is_large_string(kind) or str(kind) == "string_view"
    return bool(
        text or types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind) or types.is_null(kind)
    )


def records(batches: Any, first: int = 0) -> Iterator[Row]:
    """Yield every row of some record batches; the first one's number is `first`."""
    number = first
    for batch in batches:
        columns = list(zip(batch.schema.names, batch.columns))
        for place in range(batch.num_rows):
            where = f"row {number + 1}"
            try:
                yield Row(str(number), where, {name: column[place].as_py() for name, column in columns})
            except (UnicodeDecodeError, ValueError, OverflowError) as error:
                yield Row(str(number), where, fault=SourceError(f"{where} cannot be read", got=first_line(error)))
            number += 1


def length(value: Any) -> int:
    """About how many bytes of memory a record's texts take."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return 8 + sum(map(length, value.values()))
    return 8 + sum(map(length, value)) if isinstance(value, list) else 8


def _leaves(opened: Any) -> list[str]:
    """The paths of all columns of bytes, at any depth."""
    schema = opened.schema
    return [schema.column(n).path for n in range(len(schema)) if schema.column(n).physical_type == "BYTE_ARRAY"]


def _columns(group: Any, names: list[str]) -> Iterator[Any]:
    for number in range(group.num_columns):
        column = group.column(number)
        if column.path_in_schema.split(".")[0] in names:
            yield column


def _size(group: Any, names: list[str]) -> int:
    """Bytes of a row group's columns, decompressed."""
    return sum(column.total_uncompressed_size for column in _columns(group, names))


def _swells(group: Any, names: list[str], most: int) -> bool:
    """Whether a column of a row group is packed as no text is, or a batch of its rows alone takes more than `most`."""
    for column in _columns(group, names):
        size = column.total_uncompressed_size
        if size > MOST_PACKED * column.total_compressed_size or BATCH_ROWS * size / max(1, group.num_rows) > most:
            return True
    return False


VARIANT = Parquet
