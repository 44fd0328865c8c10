"""What every format of files is: the suffixes that tell it, and the rows that it reads."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from tunediff.core.errors import SourceError
from tunediff.texts.files import File


@dataclass(frozen=True)
class Row:
    """One record of a file: a text, an object or a list of messages; or why it cannot be read."""

    key: str
    """What tells it from the file's other records, such as its number from 0; empty if it is the whole file."""
    where: str
    """Its place in the file, in words."""
    value: Any = None
    fault: SourceError | None = None


class Format(ABC):
    """A format of files. Variants have no settings."""

    suffixes: ClassVar[tuple[str, ...]]
    """Suffixes of its files, in small letters."""
    kind: ClassVar[str] = "prose"
    """Kind of a document that is one plain text."""
    is_text: ClassVar[bool] = False
    """Whether a file is one text, and not records."""

    @abstractmethod
    def rows(self, file: File) -> Iterator[Row]:
        """Yield the records of a file up to its share.

        A record that cannot be read is a row with its fault. Raises SourceError if the file cannot be read at all,
        MissingExtraError if a library is missing that it needs.
        """
