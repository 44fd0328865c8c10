"""Data sets of the Hugging Face hub, streamed by the library `datasets`; no code of theirs is run."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from tunediff.core.errors import MissingExtraError, SourceError, first_line
from tunediff.texts.files import File
from tunediff.texts.formats.base import Format, Row
from tunediff.texts.formats.parquet import length

NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(?::[\w.+-]+){0,2}")
"""``owner/name``, ``owner/name:SPLIT`` or ``owner/name:CONFIG:SPLIT``."""
MEDIA = ("Image", "Audio", "Video", "Pdf", "Array2D", "Array3D", "Array4D", "Array5D")
"""Types of columns that hold no text, and that may need further libraries."""


class Hub(Format):
    """A data set of the hub: its split ``train``, or else its first."""

    suffixes = ()

    def rows(self, file: File) -> Iterator[Row]:
        name, *rest = file.label.split(":")
        try:
            datasets = importlib.import_module("datasets")
        except ImportError:
            raise MissingExtraError(
                f"{file.label} is no file or folder here, and a data set of the hub needs the library datasets",
                remedy="pip install 'tunediff[datasets]'",
            ) from None
        try:
            found = datasets.load_dataset(
                name, rest[0] if len(rest) > 1 else None, split=rest[-1] if rest else None, streaming=True
            )
            if isinstance(found, Mapping):
                split = "train" if "train" in found else next(iter(found))
                if len(found) > 1:
                    others = [str(other) for other in found if other != split]
                    file.remarks.add("splits of a data set left out", ", ".join(others), len(others))
                found = found[split]
            if media := [n for n, kind in (found.features or {}).items() if type(kind).__name__ in MEDIA]:
                file.remarks.add("columns of images and sounds left out", ", ".join(media), len(media))
                found = found.remove_columns(media)
            yield from _upto(file, found)
        except Exception as error:  # the library and the network raise anything
            raise SourceError(
                f"{file.label} cannot be read from the hub",
                got=f"{type(error).__name__}: {first_line(error)}",
                expected="owner/name, owner/name:SPLIT or owner/name:CONFIG:SPLIT",
            ) from None


def _upto(file: File, found: Any) -> Iterator[Row]:
    """The first rows, up to the file's share."""
    for number, record in enumerate(found):
        yield Row(str(number), f"row {number + 1}", record)
        if not file.share.take(length(record)) or number + 1 >= file.share.documents:
            file.share.cut = True
            return


VARIANT = Hub
