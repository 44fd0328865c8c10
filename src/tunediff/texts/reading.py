"""Read files, folders, patterns and data sets of the hub into documents, and count what is left out."""

from __future__ import annotations

import dataclasses
import importlib
import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tunediff.core import variants
from tunediff.core.errors import CorpusError, SourceError, within
from tunediff.core.remarks import Remark, Remarks
from tunediff.texts import files
from tunediff.texts.document import Document
from tunediff.texts.files import File
from tunediff.texts.formats.base import Format, Row
from tunediff.texts.formats.hub import NAME, Hub
from tunediff.texts.records import Records


@dataclass(frozen=True)
class ReadSettings:
    """How files become documents."""

    kind: str = ""
    """Label of documents that have none of their own."""
    text_field: str = ""
    """Column that holds the text; empty: ``text``, ``content``, or the one column that holds any."""
    messages_field: str = ""
    """Column that holds the messages of a chat; empty: ``messages``, ``conversations`` and other usual names."""
    broken: float = 0.05
    """Largest share of rows (0..1) that may be unreadable and are then left out; with more the files are refused."""
    max_bytes: int = 64 << 20
    """Most bytes of text that are read, decompressed; larger files are read at places spread over them, where they can be."""
    max_documents: int = 50_000
    """Most documents that are read; of more, some from all over the files."""

    def __post_init__(self) -> None:
        within("corpus", self, broken=(0, 1), max_bytes=1, max_documents=1)


@dataclass(frozen=True)
class Reading:
    """What files held: their documents, and remarks on what was left out or changed."""

    documents: tuple[Document, ...]
    remarks: tuple[Remark, ...]


def read(given: Sequence[str | Path], settings: ReadSettings, prompts: bool = False) -> Reading:
    """Read every document of these files, folders, patterns and data sets of the hub, in order.

    prompts   make open chats of them: a line of a text file is a chat, answers are left out

    Raises SourceError (missing, refused or unreadable file, too many unreadable rows), MissingExtraError, CorpusError
    (nothing in them is text).
    """
    remarks = Remarks()
    reader = _Reader(settings, prompts, remarks)
    found = list(_found(given, remarks))
    documents: list[Document] = []
    left_bytes, left_documents = settings.max_bytes, settings.max_documents
    for number, file in enumerate(found):
        files_left = len(found) - number
        file.share = files.Share(max(1, left_bytes // files_left), max(1, left_documents // files_left))
        new = list(reader.file(file))
        documents += new
        left_bytes, left_documents = left_bytes - file.share.taken, left_documents - len(new)
        if file.share.cut:
            remarks.add(
                "files read in part, as they hold more than corpus.max_bytes or corpus.max_documents", str(file.path)
            )
    reader.end()
    if not documents:
        names = ", ".join(map(str, given)) or "an empty list of paths"
        told = "; ".join(map(str, remarks.all()))
        raise CorpusError(f"{names} holds no text", expected="prompts" if prompts else "text", got=told)
    only = documents[0].group
    if len(documents) > 1 and only and all(document.id.startswith(f"{only}/") for document in documents):
        remarks.add("the pieces of the only text are split as if they were texts", only)
        documents = [dataclasses.replace(document, group="") for document in documents]
    return Reading(tuple(documents), remarks.all())


@cache
def formats() -> dict[str, Format]:
    """Every format by the suffixes of its files."""
    package = Format.__module__.rpartition(".")[0]
    made = [importlib.import_module(f"{package}.{name}").VARIANT() for name in variants.names(package)]
    return {suffix: one for one in made for suffix in one.suffixes}


def _found(given: Sequence[str | Path], remarks: Remarks) -> Iterator[File]:
    for path in given:
        if not os.path.lexists(path) and NAME.fullmatch(str(path)) and files.suffix_of(Path(path)) not in formats():
            yield File(Path(path), str(path), remarks, on_hub=True)
        else:
            yield from files.find([path], formats(), remarks)


class _Reader:
    """One reading of some files."""

    def __init__(self, settings: ReadSettings, prompts: bool, remarks: Remarks) -> None:
        self.settings, self.prompts, self.remarks = settings, prompts, remarks
        self.records = Records(settings.kind, settings.text_field, settings.messages_field, prompts, remarks)
        self.labels: Counter[str] = Counter()
        self.ids: Counter[str] = Counter()
        self.rows = self.broken = 0
        self.fault: SourceError | None = None

    def file(self, file: File) -> Iterator[Document]:
        """Yield the documents of one file; their ids start with its label."""
        one = Hub() if file.on_hub else _format(file.path)
        label = file.label if one.is_text or file.on_hub else _stem(file)
        self.labels[label] += 1
        source = label if self.labels[label] == 1 else f"{label}~{self.labels[label]}"
        count = 0
        for row in self._rows(one, file):
            where = f"{file.path}, {row.where}"
            id = f"{source}#{row.key}" if row.key else source
            self.rows += 1
            try:
                if row.fault:
                    raise row.fault
                new = self.records.documents(row.value, id, source, where, one.kind)
            except (SourceError, RecursionError) as error:
                self._leave_out(error, where)
                continue
            for document in new:
                yield self._unique(document, where)
            count += len(new)
            if count >= file.share.documents:
                file.share.cut = True
                return

    def _rows(self, one: Format, file: File) -> Iterator[Row]:
        if one.is_text and self.prompts:
            lines = file.lines()
            return (Row(line.key, line.where, line.text.strip(), line.fault) for line in lines if line.text.strip())
        return one.rows(file)

    def _unique(self, document: Document, where: str) -> Document:
        """The document under an id that no earlier one has."""
        self.ids[document.id] += 1
        if self.ids[document.id] == 1:
            return document
        self.remarks.add("ids that occur more than once changed", where)
        return self._unique(dataclasses.replace(document, id=f"{document.id}~{self.ids[document.id]}"), where)

    def _leave_out(self, error: Exception, where: str) -> None:
        self.broken += 1
        fault = error if isinstance(error, SourceError) else SourceError(f"{where} is nested too deeply")
        self.fault = self.fault or fault
        self.remarks.add("unreadable rows left out", fault.what)

    def end(self) -> None:
        """Refuse if too many rows were unreadable."""
        self.records.told()
        if self.fault and self.broken > self.settings.broken * self.rows:
            share = math.ceil(1000 * self.broken / self.rows) / 1000
            raise SourceError(
                self.fault.what,
                expected=self.fault.expected,
                got=self.fault.got
                + (f"; {self.broken:,} of {self.rows:,} rows cannot be read" if self.rows > 1 else ""),
                remedy=self.fault.remedy
                if self.broken == self.rows
                else f"mend the rows, or --set corpus.broken={share:g} to leave them out",
            )


def _stem(file: File) -> str:
    """A file's label without its suffixes."""
    label = file.label[: -len(file.path.suffix)] if file.is_compressed else file.label
    return label[: -len(file.suffix)]


def _format(path: Path) -> Format:
    """The format of a file; raises SourceError if none reads it."""
    files.regular(path)
    suffix = files.suffix_of(path)
    if suffix in formats():
        return formats()[suffix]
    expected = ", ".join(formats())
    if suffix in files.REFUSED:
        raise SourceError(
            f"{path} is refused: files like it can run code when opened, or hold no text",
            got=suffix,
            expected=expected,
            remedy="save the text as .jsonl",
        )
    if suffix in files.PACKED:
        raise SourceError(f"{path} is an archive of files", got=suffix, expected=expected, remedy="unpack it first")
    raise SourceError(f"{path} is of no kind that is read", got=suffix or "no suffix", expected=expected)
