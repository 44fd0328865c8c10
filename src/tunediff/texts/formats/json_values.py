"""JSON: a record a line, one array of records, or an object that holds them, whatever the file is called."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from tunediff.core.errors import SourceError, first_line
from tunediff.texts import files
from tunediff.texts.fields import MESSAGES, PROMPTS, TEXTS, looks_like_message
from tunediff.texts.files import File
from tunediff.texts.formats.base import Format, Row

SPACE = " \t\r\n\ufeff"
CHUNK_BYTES = 256 << 10
"""How much of a file is read at a time."""
HOLDERS = ("data", "rows", "train", "examples", "records", "items", "instances", "dialogues")
"""Names under which an object holds the list of a file's records, in order of preference."""


class JsonValues(Format):
    """JSON lines, or JSON."""

    suffixes = (".jsonl", ".ndjson", ".json", ".jsonlines")

    def rows(self, file: File) -> Iterator[Row]:
        if _is_lines(file.head.decode(file.encoding, errors="ignore")):
            yield from self._lines(file)
        else:
            yield from _Values(file).rows()

    def _lines(self, file: File) -> Iterator[Row]:
        number = 0
        for line in file.lines():
            if not line.text.strip() and not line.fault:
                continue
            key = line.key if line.key.startswith("@") else str(number)
            number += 1
            if line.fault:
                yield Row(key, line.where, fault=line.fault)
                continue
            try:
                yield Row(key, line.where, json.loads(line.text))
            except (ValueError, RecursionError) as error:
                yield Row(key, line.where, fault=_broken(file, line.where, first_line(error)))


def _is_lines(head: str) -> bool:
    """Whether a file that starts like this holds one record a line."""
    lines = [line for line in head.split("\n", 64) if line.strip()][:3]
    if not lines or lines[0].strip() in ("[", "{"):
        return False
    if _parses(lines[0]):
        return len(lines) > 1
    if lines[0].lstrip()[:1] not in ("[", "{"):
        return True
    return len(lines) > 1 and _parses(lines[1])


def _parses(text: str) -> bool:
    try:
        json.loads(text)
        return True
    except (ValueError, RecursionError):
        return False


def _broken(file: File, where: str, why: str) -> SourceError:
    return SourceError(f"{file.path}, {where} is not JSON", got=why, expected="a JSON object")


class _Values:
    """JSON values one after the other in a file, an array's records one by one."""

    def __init__(self, file: File) -> None:
        self.file, self.text, self.at, self.line, self.ended = file, "", 0, 1, False
        self.raw_decode = json.JSONDecoder().raw_decode

    def rows(self) -> Iterator[Row]:
        """Yield the file's records; raises SourceError at one that is not JSON, as nothing tells where the next begins."""
        number, where = 0, ""
        try:
            with self.file.open() as self.bytes:
                self.decode = codecs.getincrementaldecoder(self.file.encoding)("replace").decode
                for where, value in self._records():
                    yield Row(str(number), where, value)
                    number += 1
        except (json.JSONDecodeError, RecursionError) as error:
            if self.file.share.cut:
                return
            at = self._line(error.pos if isinstance(error, json.JSONDecodeError) else self.at)
            why = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
            fault = _broken(self.file, f"line {at}", why)
            if number:
                raise fault from None  # what follows would be lost without a count
            yield Row("0", where, fault=fault)
        except files.FAULTS as error:
            raise self.file.unreadable(error) from None

    def _records(self) -> Iterator[tuple[str, Any]]:
        if self._next() != "[":
            while self._next():
                where = f"line {self.line}"
                value = self._value(self.file.share.bytes)
                held = _held(value)
                if held is None:
                    yield where, value
                else:
                    yield from ((f"record {number + 1}", record) for number, record in enumerate(held))
            return
        self.at += 1
        records = enumerate(self._elements())
        for number, record in records:
            if number == 0 and looks_like_message(record):
                yield "the whole array", [record, *(other for _, other in records)]
            else:
                yield f"record {number + 1}", record

    def _elements(self) -> Iterator[Any]:
        while self._next(",") not in ("]", ""):
            yield self._value(files.MAX_DOCUMENT_BYTES)
        if self._next() == "":
            raise json.JSONDecodeError("the array does not end", self.text, self.at)

    def _next(self, passed: str = "") -> str:
        """The next character that is neither white space nor `passed`; empty at the end."""
        while True:
            while (found := self.text[self.at : self.at + 1]) and found in SPACE + passed:
                self.at += 1
            if found or not self._fill(CHUNK_BYTES):
                return found

    def _value(self, most: int) -> Any:
        """The value that starts here, of at most so many characters."""
        wanted = CHUNK_BYTES
        while True:
            try:
                value, end = self.raw_decode(self.text, self.at)
                if end < len(self.text) or not self._fill(CHUNK_BYTES):
                    self.at = end
                    return value
            except json.JSONDecodeError:
                if len(self.text) - self.at > most or not self._fill(wanted):
                    raise
                wanted *= 2

    def _fill(self, count: int) -> bool:
        """Read on; whether there was more."""
        share = self.file.share
        if self.ended:
            return False
        new = self.bytes.read(max(1, min(count, share.bytes - share.taken)))
        self.ended = not new
        if new and not share.take(len(new)):
            share.cut = self.ended = bool(self.bytes.read(1))
        self.line += self.text.count("\n", 0, self.at)
        self.text = self.text[self.at :] + self.decode(new, not new)
        self.at = 0
        return bool(new)

    def _line(self, position: int) -> int:
        return self.line + self.text.count("\n", 0, position)


def _held(value: Any) -> Iterable[Any] | None:
    """The records that an object holds in a list, or in a list for each column; None for one that is a record itself."""
    if not isinstance(value, Mapping):
        return None
    lists = {name: item for name, item in value.items() if isinstance(item, list) and item}
    named = [name for name in value if name.lower() in (*TEXTS, *MESSAGES, *PROMPTS)]
    if any(name in lists and _is_column(name, lists[name]) for name in named):
        if len(lists) == len(value) and len(set(map(len, lists.values()))) == 1:
            return (dict(zip(lists, row)) for row in zip(*lists.values()))
    tables = [
        n for n, item in lists.items() if isinstance(item[0], (Mapping, list)) and not looks_like_message(item[0])
    ]
    chosen = [name for name in HOLDERS if name in tables] or (tables if len(tables) == 1 else [])
    if named or not chosen:
        return None
    return (
        one["row"] if isinstance(one, Mapping) and "row_idx" in one and "row" in one else one
        for one in lists[chosen[0]]
    )


def _is_column(name: str, values: list[Any]) -> bool:
    """Whether a list holds a text or a chat of each record, and is not one record's chat."""
    first = values[0]
    if name.lower() in MESSAGES:
        return isinstance(first, list) and bool(first) and isinstance(first[0], Mapping)
    return isinstance(first, str)


VARIANT = JsonValues
