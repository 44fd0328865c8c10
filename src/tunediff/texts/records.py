"""Records: a row of a data set, in any form that trainers write, as one document or several."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from tunediff.core.axes import WRITERS
from tunediff.core.errors import SourceError
from tunediff.core.remarks import Remarks
from tunediff.texts import files
from tunediff.texts.document import Document
from tunediff.texts.fields import (
    ANSWERS,
    BESIDE_PROMPT,
    HISTORIES,
    MESSAGES,
    PROMPTS,
    SYSTEMS,
    TEXTS,
    looks_like_message,
    role_of,
)
from tunediff.texts.messages import Message, Messages, parsed, shown, turns
from tunediff.texts.pieces import pieces

OWN = ("id", "kind", "writer", "group")
"""Columns that say something of the document and are no text of it."""
LONGEST_NAME = 200
"""Longest id, kind or group that is taken over, in characters."""
THREAD = ("message_id", "parent_id", "text", "role")
"""Columns of messages that each stand in a row of their own and name the one that they answer (2304.07327)."""


class Columns:
    """A record's columns by name, in small letters; those that were looked at and hold something are counted as read."""

    def __init__(self, record: Mapping[Any, Any]) -> None:
        self.record = {str(name): value for name, value in record.items() if value is not None}
        self.names = {name.strip().lower(): name for name in reversed(self.record)}
        self.read: set[str] = set()

    def first(self, names: tuple[str, ...]) -> str:
        """The first of these columns that holds something; empty if none does."""
        return next((self.names[name] for name in names if name in self.names), "")

    def take(self, names: tuple[str, ...] | str) -> Any:
        """The value of the first of these columns that holds something, else None."""
        name = names if isinstance(names, str) else self.first(names)
        if name:
            self.read.add(name)
        return self.record.get(name)

    @property
    def unread(self) -> list[str]:
        """The columns that nothing was read from."""
        return [name for name in self.record if name not in self.read and name not in OWN]


@dataclass
class Records:
    """Makes documents of records, and counts what it leaves out."""

    kind: str = ""
    """Kind of documents that have none of their own."""
    text_field: str = ""
    """Column of the text; empty: found."""
    messages_field: str = ""
    """Column of the messages; empty: found."""
    are_prompts: bool = False
    """Whether records are questions: an answer is left out, and a text is the user's."""
    remarks: Remarks = field(default_factory=Remarks)
    _only: dict[str, str] = field(default_factory=dict)
    _threads: dict[str, tuple[Message, ...]] = field(default_factory=dict)
    _unread: dict[str, int] = field(default_factory=dict)

    def documents(self, record: Any, id: str, source: str, where: str, kind: str = "prose") -> list[Document]:
        """The documents of one record: none if it holds no text, several if its text is long.

        record   a text, an object, or a list of messages
        id       the documents' id, unless the record has one
        source   the file's label
        where    the record's place, in words
        kind     kind of a plain text that has none of its own

        Raises SourceError if the record is of no form that is read.
        """
        own: Mapping[Any, Any] = {}
        if isinstance(record, Mapping):
            columns = Columns(record)
            own = record
            text, messages = self._content(columns, source, where)
            for name in columns.unread:
                self._unread[name[:40]] = self._unread.get(name[:40], 0) + 1
        elif isinstance(record, str):
            text, messages = record, []
        elif isinstance(record, (list, tuple)) and record:
            text, messages = "", Messages(self.remarks, where).read(record)
        elif record is None or isinstance(record, (list, tuple)):
            text, messages = "", []
        else:
            raise SourceError(f"{where}: a record is not an object", expected='{"text": …}', got=shown(record))
        for part in (text, *(part for message in messages for part in message)):
            check(part, where)
        if self.are_prompts:
            text, messages = "", self._asked(messages or [("user", text)], where)
        if not text.strip() and not messages:
            self.remarks.add("rows without text left out", where)
            return []
        if size := _excess(text, messages):
            raise SourceError(
                f"{where}: a document is too long",
                got=f"{size:,} characters",
                expected=f"at most {files.MAX_DOCUMENT_BYTES:,}",
                remedy="cut the text into documents",
            )
        group, writer = own.get("group") or own.get("message_tree_id"), own.get("writer")
        document = Document(
            id=f"{source}/{own['id']}" if _is_name(own.get("id")) else id,
            text=text,
            messages=tuple(messages),
            writer=writer if isinstance(writer, str) and writer in WRITERS else "",
            kind=own["kind"] if _is_name(own.get("kind")) else self.kind or ("chat" if messages else kind),
            group=group if isinstance(group, str) and _is_name(group) else "",
        )
        cut = list(pieces(text)) if text else []
        if len(cut) < 2:
            return [document]
        self.remarks.add("long texts cut into pieces", where)
        group = document.group or document.id
        return [
            replace(document, id=f"{document.id}/{number}", text=piece, group=group) for number, piece in enumerate(cut)
        ]

    def told(self) -> None:
        """Count the columns that nothing was read from."""
        if self._unread:
            names = sorted(self._unread, key=lambda name: -self._unread[name])
            more = f" and {len(names) - 8} more" if len(names) > 8 else ""
            self.remarks.add(
                "rows with columns that were not read", ", ".join(names[:8]) + more, max(self._unread.values())
            )

    def _asked(self, messages: list[Message], where: str) -> list[Message]:
        """The messages up to the user's last; none if the user says nothing."""
        asked = list(messages)
        while asked and asked[-1][0] == "assistant":
            asked.pop()
        if len(asked) < len(messages):
            self.remarks.add("answers to prompts left out", where)
        return asked if any(role != "system" and content.strip() for role, content in asked) else []

    # -- forms ---------------------------------------------------------------------------------------------------

    def _content(self, columns: Columns, source: str, where: str) -> tuple[str, list[Message]]:
        """(text, messages) of a record, one of them empty."""
        messages = Messages(self.remarks, where)
        if self.text_field or self.messages_field:
            return self._named(columns, messages)
        for form in (_chat, self._thread, _preferred, _text, _asked_and_answered, _by_look):
            found: str | list[Message] | None = form(columns, messages)
            if found is not None:
                return (found, []) if isinstance(found, str) else ("", found)
        return self._only_text(columns, source, where), []

    def _named(self, columns: Columns, messages: Messages) -> tuple[str, list[Message]]:
        """The content of the columns that the settings name."""
        for name, is_text in ((self.messages_field, False), (self.text_field, True)):
            value = columns.take(name) if name and name in columns.record else None
            if value is not None:
                return (messages.text(value), []) if is_text else ("", messages.read(value))
        if any(name in columns.names.values() for name in (self.messages_field, self.text_field)) or not columns.record:
            return "", []
        raise self._refused(columns, messages.where, [self.messages_field, self.text_field])

    def _thread(self, columns: Columns, messages: Messages) -> list[Message] | None:
        """A message that stands in a row of its own, after those that it answers."""
        text, role = columns.record.get("text"), columns.record.get("role")
        if not isinstance(text, str) or not isinstance(role, str) or not role_of(role):
            return None
        for name in THREAD:
            columns.take(name)
        before = self._threads.get(str(columns.record.get("parent_id")), ())
        path = (*before, *messages.read([{"role": role, "content": text}]))
        if "message_id" in columns.record:
            self._threads[str(columns.record["message_id"])] = path
        return list(path)

    def _only_text(self, columns: Columns, source: str, where: str) -> str:
        """The text of the one column that holds any; which one that is, a file's first record tells."""
        texts = [
            name
            for name, value in columns.record.items()
            if isinstance(value, str) and name not in OWN and value.strip()
        ]
        name = self._only.get(source)
        if name is None and len(texts) == 1:
            name = self._only[source] = texts[0]
        if name in columns.record and isinstance(columns.record[name], str):
            self.remarks.add("texts read from the one column that holds any", f"{name[:40]} in {where}")
            return str(columns.take(name))
        if name or not columns.record or all(_is_empty(value) for value in columns.record.values()):
            return ""
        raise self._refused(columns, where, [])

    def _refused(self, columns: Columns, where: str, wanted: list[str]) -> SourceError:
        return SourceError(
            f"{where}: no text in the record",
            got=f"columns {', '.join(name[:40] for name in list(columns.record)[:20]) or 'none'}",
            expected=", ".join(filter(None, wanted)) or ", ".join([*TEXTS, *MESSAGES[:3], *PROMPTS[:3]]),
            remedy="name the column: --set corpus.text_field=… or --set corpus.messages_field=…",
        )


Form = Callable[[Columns, Messages], "str | list[Message] | None"]


def _chat(columns: Columns, messages: Messages) -> list[Message] | None:
    """Messages in a column of their own."""
    name = columns.first(MESSAGES)
    value = parsed(columns.record.get(name))
    if not name or not isinstance(value, (list, tuple, Mapping)):
        return None
    columns.take(name)
    return _with_system(columns, messages, messages.read(value))


def _preferred(columns: Columns, messages: Messages) -> str | list[Message] | None:
    """The answer that was chosen of two."""
    if not columns.first(("chosen",)):
        return None
    chosen = parsed(columns.take(("chosen",)))
    if columns.take(("rejected",)) is not None:
        messages.remarks.add("rejected answers left out", messages.where)
    asked = _prompt(columns, messages)
    if isinstance(chosen, str):
        if asked:
            return [*asked, ("assistant", chosen)]
        return turns(chosen) or chosen
    answer = messages.read(chosen)
    whole = bool(answer) and (answer[0][0] != "assistant" or not asked)
    return answer if whole and any(role == "user" for role, _ in answer) else [*asked, *answer]


def _text(columns: Columns, messages: Messages) -> str | None:
    """A plain text."""
    name = columns.first(TEXTS)
    if not name or isinstance(columns.record[name], Mapping):
        return None
    if isinstance(columns.record[name], (list, tuple)) and not all(isinstance(p, str) for p in columns.record[name]):
        return None
    value = columns.take(name)
    return "\n\n".join(value) if isinstance(value, (list, tuple)) else messages.text(value)


def _asked_and_answered(columns: Columns, messages: Messages) -> list[Message] | None:
    """A prompt and, where there is one, its answer."""
    asked = _prompt(columns, messages)
    if not asked:
        return None
    answer = parsed(columns.take(ANSWERS))
    if answer is None:
        return asked
    if isinstance(answer, (list, tuple)) and answer and looks_like_message(answer[0]) or looks_like_message(answer):
        return [*asked, *messages.read(answer)]
    return [*asked, *messages.read([{"role": "assistant", "content": _one_answer(answer, messages)}])]


def _one_answer(answer: Any, messages: Messages) -> Any:
    """The first of several answers to one question."""
    if isinstance(answer, Mapping) and isinstance(answer.get("text"), (list, tuple)):
        answer = answer["text"]
    if isinstance(answer, (list, tuple)):
        if len(answer) > 1:
            messages.remarks.add("answers after the first left out", messages.where)
        return answer[0] if answer else ""
    return answer


def _prompt(columns: Columns, messages: Messages) -> list[Message]:
    """The messages before the answer: system, earlier turns, and what the user asks; none without a prompt."""
    name = columns.first(PROMPTS)
    if not name:
        return []
    value = parsed(columns.take(name))
    if isinstance(value, Mapping) and isinstance(value.get("replies"), (list, tuple)):
        return messages.read(list(_first_replies(value)))
    if isinstance(value, (list, tuple)) and value and not isinstance(value[0], str) or looks_like_message(value):
        return _with_system(columns, messages, messages.read(value))
    asked = messages.text(columns.record[name])
    if said := turns(asked):
        return said
    for beside in BESIDE_PROMPT:
        other = columns.names.get(beside, "")
        if other and other != name and isinstance(columns.record[other], str):
            extra = str(columns.take(other))
            asked = f"{asked}\n\n{extra}" if extra.strip() else asked
    earlier = columns.take(HISTORIES)
    before = messages.read(earlier) if earlier else []
    return _with_system(columns, messages, [*before, ("user", asked)] if asked.strip() else before)


def _first_replies(message: Mapping[Any, Any]) -> Iterator[Mapping[Any, Any]]:
    """A message of a tree, and the first reply to it, and the first to that."""
    while isinstance(message, Mapping):
        yield {"role": message.get("role", "user"), "content": message.get("text")}
        replies = message.get("replies")
        message = replies[0] if isinstance(replies, (list, tuple)) and replies else None  # type: ignore[assignment]


def _with_system(columns: Columns, messages: Messages, said: list[Message]) -> list[Message]:
    """Messages with the system's column before them, unless they begin with the system."""
    system = columns.first(SYSTEMS)
    if not system or not said or said[0][0] == "system" or not isinstance(columns.record[system], str):
        return said
    text = str(columns.take(system))
    return [("system", text), *said] if text.strip() else said


def _by_look(columns: Columns, messages: Messages) -> list[Message] | None:
    """The messages of the one column that holds any."""
    values = {name: parsed(value) for name, value in columns.record.items() if not isinstance(value, (int, float))}
    found = [n for n, v in values.items() if isinstance(v, (list, tuple)) and v and looks_like_message(v[0])]
    if len(found) != 1:
        return messages.read(columns.record) if not found and looks_like_message(columns.record) else None
    columns.take(found[0])
    return _with_system(columns, messages, messages.read(values[found[0]]))


# -- checks --------------------------------------------------------------------------------------------------------


def check(text: str, where: str) -> None:
    """Raise SourceError if a tokenizer could not take the text."""
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


def _excess(text: str, messages: list[Message]) -> int:
    """The length of a document that is too long, in characters; else 0."""
    size = len(text) + sum(len(content) for _, content in messages)
    return size if size > files.MAX_DOCUMENT_BYTES else 0


def _is_name(value: Any) -> bool:
    """Whether a value can be an id or a kind: a short text that can be written."""
    return isinstance(value, str) and 0 < len(value) <= LONGEST_NAME and value.isprintable()


def _is_empty(value: Any) -> bool:
    return (
        value is None
        or (isinstance(value, (str, list, tuple, dict)) and not value)
        or (isinstance(value, str) and not value.strip())
    )
