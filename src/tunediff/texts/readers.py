"""Read files of text, code and records into documents."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunediff.core.axes import WRITERS
from tunediff.core.errors import CorpusError, MissingExtraError, SourceError
from tunediff.texts.document import Document

PROSE = (".txt", ".md", ".rst")
"""Suffixes of plain text."""
CODE = (".py", ".js", ".ts", ".c", ".h", ".cpp", ".rs", ".go", ".java", ".rb", ".sh", ".sql")
"""Suffixes of source code, read as plain text."""
RECORDS = (".jsonl", ".ndjson", ".json", ".parquet")
"""Suffixes of files that hold one document a record."""
READABLE = PROSE + CODE + RECORDS
"""All suffixes that are read."""
REFUSED = (".pkl", ".pickle", ".bin", ".pt", ".pth", ".ckpt", ".joblib", ".npy", ".npz", ".dill")
"""Suffixes of files that can run code when opened, or hold no text."""

TEXT_FIELDS = ("text", "content")
"""Columns that hold a plain text, in order of preference."""
MESSAGE_FIELDS = ("messages", "conversations", "conversation")
"""Columns that hold the messages of a chat, in order of preference."""
PROMPT_FIELDS = ("prompt", "instruction", "question")
"""Columns that hold the user's message of a one-turn chat, in order of preference."""
ANSWER_FIELDS = ("completion", "response", "output", "answer")
"""Columns that hold the assistant's message of a one-turn chat, in order of preference."""
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
"""Role names of other formats, and the chat-template role that each stands for."""

MAX_DOCUMENT_BYTES = 16 << 20
"""Largest line or document that is read, in bytes."""
MAX_JSON_BYTES = 512 << 20
"""Largest ``.json`` file that is read, in bytes: it is parsed in one piece."""
WHOLE_FILE_CHARACTERS = 20_000
"""Longest text file or paragraph that is kept whole, in characters."""
PIECE_CHARACTERS = 2_000
"""About how long a document is that is cut from a longer text file, in characters."""


def read(
    paths: Sequence[Path],
    *,
    kind: str | None = None,
    text_field: str | None = None,
    messages_field: str | None = None,
    skip_empty: bool = False,
) -> list[Document]:
    """Read every document of these files and folders, in order; arguments and errors as `Corpus.from_files`."""
    reader = _Reader(kind, text_field, messages_field, skip_empty)
    documents: list[Document] = []
    taken: Counter[str] = Counter()
    for path, label in _files(paths):
        if path.suffix.lower() in RECORDS:
            label = label[: -len(path.suffix)]
        taken[label] += 1
        source = label if taken[label] == 1 else f"{label}~{taken[label]}"
        documents.extend(reader.read(path, source))
    return documents


def _files(given: Sequence[Path]) -> Iterator[tuple[Path, str]]:
    """Yield every file to read, with the label that its documents' ids start with: its path within the given folder."""
    for path in given:
        if path.is_dir():
            inside = sorted(
                file
                for file in path.rglob("*")
                if file.is_file()
                and file.suffix.lower() in READABLE
                and not any(part.startswith(".") for part in file.relative_to(path).parts)
            )
            if not inside:
                raise SourceError(f"{path} holds no file that can be read", expected=", ".join(READABLE))
            yield from ((file, file.relative_to(path).as_posix()) for file in inside)
        elif not path.exists():
            raise SourceError(f"{path} does not exist", expected="a file or folder of text")
        else:
            yield path, path.name


@dataclass(frozen=True)
class _Reader:
    """Settings of one reading; `kind`, the fields and `skip_empty` as in `Corpus.from_files`."""

    kind: str | None
    text_field: str | None
    messages_field: str | None
    skip_empty: bool

    def read(self, path: Path, source: str) -> Iterator[Document]:
        """Yield the documents of one file; their ids start with `source`."""
        suffix = path.suffix.lower()
        if suffix in REFUSED:
            raise SourceError(
                f"{path} is refused: files like it can run code when opened, or hold no text",
                got=suffix,
                expected=", ".join(READABLE),
                remedy="save the text as .jsonl",
            )
        if suffix not in READABLE:
            raise SourceError(
                f"{path} is of no kind that is read", got=suffix or "no suffix", expected=", ".join(READABLE)
            )
        if suffix in PROSE + CODE:
            yield from self._texts(path, source, self.kind or ("code" if suffix in CODE else "prose"))
            return
        records = {".json": _json_records, ".parquet": _parquet_records}.get(suffix, _line_records)
        for number, where, record in records(path):
            document = self._document(record, f"{source}#{number}", source, f"{path}, {where}")
            if document is not None:
                yield document

    def _texts(self, path: Path, source: str, kind: str) -> Iterator[Document]:
        text = _clean("".join(line for _, line in _lines(path)), str(path))
        if not text.strip():
            if not self.skip_empty:
                raise CorpusError(f"{path} is empty", expected="text", remedy="remove it, or skip_empty=True")
            return
        if len(text) <= WHOLE_FILE_CHARACTERS:
            yield Document(source, kind, text)
            return
        for number, piece in enumerate(_pieces(text)):
            yield Document(f"{source}#{number}", kind, piece)

    def _document(self, record: Any, id: str, source: str, where: str) -> Document | None:
        if isinstance(record, str):
            record = {self.text_field or "text": record}
        if not isinstance(record, Mapping):
            raise SourceError(f"{where}: a record is not an object", expected='{"text": …}', got=repr(record)[:80])
        if isinstance(record.get("id"), str) and record["id"]:
            id = f"{source}/{_clean(record['id'], where)}"
        text, messages = self._content(record, where)
        size = len(text) + sum(len(content) for _, content in messages)
        if size > MAX_DOCUMENT_BYTES:
            raise SourceError(
                f"{where}: a document is too long",
                got=f"{size:,} characters",
                expected=f"at most {MAX_DOCUMENT_BYTES:,}",
                remedy="cut the text into documents",
            )
        if not text.strip() and not any(content.strip() for _, content in messages):
            if not self.skip_empty:
                raise CorpusError(
                    f"{where}: a document is empty", expected="text", remedy="remove it, or skip_empty=True"
                )
            return None
        kind, writer = record.get("kind"), record.get("writer")
        return Document(
            id=id,
            text=text,
            messages=messages,
            writer=writer if writer in WRITERS else "",
            kind=kind if isinstance(kind, str) and kind else self.kind or ("chat" if messages else "prose"),
            group=record["group"] if isinstance(record.get("group"), str) else "",
        )

    def _content(self, record: Mapping[str, Any], where: str) -> tuple[str, tuple[tuple[str, str], ...]]:
        """Return (text, messages) of a record, one of them empty."""
        if self.messages_field or not self.text_field:
            if found := _first(record, [self.messages_field] if self.messages_field else MESSAGE_FIELDS):
                return "", _messages(record[found], where)
        if self.text_field or not self.messages_field:
            if found := _first(record, [self.text_field] if self.text_field else TEXT_FIELDS):
                if not isinstance(record[found], str):
                    raise SourceError(
                        f"{where}: {found} is not text", got=repr(record[found])[:80], expected="a string"
                    )
                return _clean(record[found], where), ()
        if not (self.text_field or self.messages_field) and (found := _first(record, PROMPT_FIELDS)):
            parts = [("user", record[found])]
            if isinstance(record.get("input"), str) and record["input"]:
                parts = [("user", f"{record[found]}\n\n{record['input']}")]
            if answer := _first(record, ANSWER_FIELDS):
                parts.append(("assistant", record[answer]))
            return "", _messages([{"role": role, "content": content} for role, content in parts], where)
        wanted = [name for name in (self.messages_field, self.text_field) if name]
        raise SourceError(
            f"{where}: no text in the record",
            got=f"columns {', '.join(map(str, record)) or 'none'}",
            expected=", ".join(wanted or [*TEXT_FIELDS, *MESSAGE_FIELDS, *PROMPT_FIELDS]),
            remedy='name the column: text_field="…" or messages_field="…"',
        )


def _first(record: Mapping[str, Any], names: Iterable[str]) -> str | None:
    """The first of these columns that the record has."""
    return next((name for name in names if record.get(name) is not None), None)


def _messages(value: Any, where: str) -> tuple[tuple[str, str], ...]:
    """(role, content) of each message of a chat, in any of the formats that are read."""
    out = []
    for message in value if isinstance(value, (list, tuple)) else [value]:
        role = content = None
        if isinstance(message, Mapping):
            role, content = (message.get("role", message.get("from")), message.get("content", message.get("value")))
        elif isinstance(message, (list, tuple)) and len(message) == 2:
            role, content = message
        if not isinstance(role, str) or not isinstance(content, str):
            raise SourceError(
                f"{where}: a message is not one", expected='{"role": "user", "content": "…"}', got=repr(message)[:80]
            )
        out.append((_clean(ROLES.get(role, role), where), _clean(content, where)))
    return tuple(out)


def _clean(text: str, where: str) -> str:
    """Return the text; raise SourceError if a tokenizer could not take it."""
    if "\0" in text:
        raise SourceError(f"{where}: the text holds NUL characters", expected="UTF-8 text", got="binary data or UTF-16")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise SourceError(
            f"{where}: the text holds half of a surrogate pair",
            expected="whole characters",
            got=f"\\u{ord(text[error.start]):04x} at character {error.start + 1}",
        ) from None
    return text


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (number from 1, text) of each line; a line over `MAX_DOCUMENT_BYTES` is refused before it is read whole."""
    try:
        with open(path, "rb") as file:
            number = 0
            while line := file.readline(MAX_DOCUMENT_BYTES + 1):
                number += 1
                if len(line) > MAX_DOCUMENT_BYTES:
                    raise SourceError(
                        f"{path}, line {number} is too long",
                        got=f"more than {MAX_DOCUMENT_BYTES >> 20} MiB",
                        expected=f"at most {MAX_DOCUMENT_BYTES >> 20} MiB a line",
                        remedy="cut the text into documents",
                    )
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    raise SourceError(
                        f"{path}, line {number} is not UTF-8",
                        expected="UTF-8 text",
                        got=f"byte 0x{line[error.start]:02x} at byte {error.start + 1}",
                        remedy="convert the file to UTF-8",
                    ) from None
                yield number, text.replace("\r\n", "\n")
    except OSError as error:
        raise SourceError(f"{path} cannot be read", got=error.strerror or str(error)) from None


def _pieces(text: str) -> Iterator[str]:
    """Cut a long text at blank lines (a very long paragraph at its lines) into pieces of about `PIECE_CHARACTERS`."""
    units: list[tuple[str, str]] = []
    for paragraph in re.split(r"\n(?:[ \t]*\n)+", text):
        lines = [paragraph] if len(paragraph) <= WHOLE_FILE_CHARACTERS else paragraph.split("\n")
        units += [("\n\n" if place == 0 else "\n", line) for place, line in enumerate(lines) if line.strip()]
    piece: list[str] = []
    size = 0
    for gap, unit in units:
        if piece and size + len(unit) > PIECE_CHARACTERS:
            yield "".join(piece)
            piece, size = [], 0
        piece += [gap, unit] if piece else [unit]
        size += len(unit)
    if piece:
        yield "".join(piece)


def _line_records(path: Path) -> Iterator[tuple[int, str, Any]]:
    """Yield (number from 0, place, record) of each line of JSON lines."""
    number = 0
    for line_number, line in _lines(path):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise SourceError(
                f"{path}, line {line_number} is not JSON",
                got=str(error),
                expected="one JSON object a line",
                remedy="a file that is one JSON array is named .json",
            ) from None
        yield number, f"line {line_number}", record
        number += 1


def _json_records(path: Path) -> Iterator[tuple[int, str, Any]]:
    """Yield (number from 0, place, record) of a JSON array, or of the one list of records in an object."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise SourceError(
                f"{path} is too large for one JSON value",
                got=f"{path.stat().st_size >> 20} MiB",
                expected=f"at most {MAX_JSON_BYTES >> 20} MiB",
                remedy="write one record a line, as .jsonl",
            )
        value = json.loads(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise SourceError(f"{path} cannot be read", got=error.strerror or str(error)) from None
    except UnicodeDecodeError as error:
        raise SourceError(f"{path} is not UTF-8", got=str(error), remedy="convert the file to UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise SourceError(
            f"{path} is not JSON",
            got=str(error),
            expected="an array of records",
            remedy="a file of one record a line is named .jsonl",
        ) from None
    if isinstance(value, Mapping):
        lists = [item for item in value.values() if isinstance(item, list) and item and isinstance(item[0], Mapping)]
        named = any(name in value for name in (*TEXT_FIELDS, *MESSAGE_FIELDS, *PROMPT_FIELDS))
        value = lists[0] if len(lists) == 1 and not named else [value]
    if not isinstance(value, list):
        raise SourceError(f"{path} holds no records", expected="an array of objects", got=type(value).__name__)
    for number, record in enumerate(value):
        yield number, f"record {number + 1}", record


def _parquet_records(path: Path) -> Iterator[tuple[int, str, Any]]:
    """Yield (number from 0, place, record) of each row of a Parquet file."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MissingExtraError(
            f"{path} is a Parquet file, which needs pyarrow", remedy="pip install 'tunediff[parquet]'"
        ) from None
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for record in batch.to_pylist():
                    yield number, f"row {number + 1}", record
                    number += 1
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{path} is not a whole Parquet file", got=str(error).splitlines()[0]) from None
