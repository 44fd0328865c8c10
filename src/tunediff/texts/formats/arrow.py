"""Arrow and Feather: a record a row; the files of which folders that `datasets` saved consist."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tunediff.core.errors import SourceError, first_line
from tunediff.texts.files import FAULTS, File, regular
from tunediff.texts.formats.base import Format, Row
from tunediff.texts.formats.parquet import arrow, length, records, text_columns


class Arrow(Format):
    """Arrow's stream and file formats."""

    suffixes = (".arrow", ".feather", ".ipc")

    def rows(self, file: File) -> Iterator[Row]:
        pyarrow, _ = arrow(file)
        regular(file.path)
        try:
            with pyarrow.memory_map(str(file.path)) as source:
                if file.head.startswith(b"ARROW1"):
                    reader = pyarrow.ipc.open_file(source)
                    total = reader.num_record_batches
                    part = min(1.0, file.share.bytes / max(1, file.size))
                    count = max(1, round(part * total))
                    batches = (reader.get_batch(total * number // count) for number in range(count if total else 0))
                    file.share.cut |= count < total
                else:
                    batches = reader = pyarrow.ipc.open_stream(source)
                yield from _upto(file, batches, text_columns(reader.schema, file))
        except FAULTS as error:
            raise SourceError(f"{file.path} is not a whole Arrow file", got=first_line(error)) from None


def _upto(file: File, batches: Any, names: list[str]) -> Iterator[Row]:
    """The rows of some batches, up to the file's share."""
    for number, row in enumerate(records(batch.select(names) for batch in batches)):
        if file.share.cut and number >= file.share.documents:
            return
        yield row
        if not file.share.take(length(row.value)) or number + 1 >= file.share.documents:
            file.share.cut = True
            return


VARIANT = Arrow
