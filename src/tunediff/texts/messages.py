"""Messages of a chat as (role, content) pairs, from any of the forms that trainers write."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from tunediff.core.errors import SourceError
from tunediff.core.remarks import Remarks
from tunediff.texts.fields import CONTENT_KEYS, MESSAGES, ROLE_KEYS, role_of

Message = tuple[str, str]

TURN_KEYS = {
    **dict.fromkeys(("input", "prompt", "question"), "user"),
    **dict.fromkeys(("output", "response", "answer"), "assistant"),
}
"""Keys of an object that holds a question and its answer, and whose words they are."""
CALLS = ("tool_calls", "function_call")
"""Keys of a message that hold calls of tools."""
TEXT_PARTS = ("text", "input_text", "output_text", "tool_result")
"""Types of a content's parts that hold text."""
TURN = re.compile(r"(?:\A|\n\n)(Human|Assistant|System):[ \t]?")
"""Where a turn begins in a chat that is written as one text (Bai et al. 2022, 2204.05862)."""
MAX_LITERAL = 1 << 20
"""Longest text that is tried as a Python literal, in characters."""


class Messages:
    """Reads the messages of one record; what is left out or changed is counted with the record's place."""

    def __init__(self, remarks: Remarks, where: str) -> None:
        self.remarks, self.where = remarks, where

    def read(self, value: Any) -> list[Message]:
        """Every message of a chat that holds text; raises SourceError for what is no chat."""
        return [message for message in self._all(value) if self._says(*message)]

    def _says(self, role: str, content: str) -> bool:
        if not content.strip() and role != "system":
            self.remarks.add("messages without text left out", self.where)
        return bool(content.strip())

    def _all(self, value: Any) -> Iterator[Message]:
        value = parsed(value)
        if isinstance(value, Mapping):
            inner = next((value[name] for name in MESSAGES if isinstance(value.get(name), (list, tuple))), None)
            yield from self._of_object(value) if inner is None else self._all(inner)
        elif isinstance(value, (list, tuple)):
            yield from self._of_list(value)
        else:
            raise self.no_message(value)

    def _of_list(self, value: list[Any] | tuple[Any, ...]) -> Iterator[Message]:
        for number, message in enumerate(value):
            if isinstance(message, Mapping):
                yield from self._of_object(message)
            elif isinstance(message, str):
                yield ("user", "assistant")[number % 2], message
            elif isinstance(message, (list, tuple)) and len(message) == 2 and isinstance(message[0], str):
                if role := role_of(message[0]):
                    yield self._role(message[0], role), self.text(message[1])
                else:
                    yield from (("user", message[0]), ("assistant", self.text(message[1])))
            elif message is not None:
                raise self.no_message(message)

    def _of_object(self, message: Mapping[Any, Any]) -> Iterator[Message]:
        name = next((message[key] for key in ROLE_KEYS if message.get(key) is not None), None)
        if isinstance(name, Mapping):
            name = name.get("role")
        if isinstance(name, str) and name.strip():
            present = [key for key in CONTENT_KEYS if key in message]
            key = next((key for key in present if message[key] is not None), None)
            calls = [message[name] for name in CALLS if message.get(name)]
            if not present and not calls:
                raise self.no_message(message)
            content = self.text(message[key]) if key else ""
            if calls:
                self.remarks.add("calls of tools written as text", self.where)
                content = "\n".join([content] * bool(content) + [self._calls(call) for call in calls])
            for thought in ("reasoning_content", "reasoning", "thinking"):
                if message.get(thought):
                    self.remarks.add(f"{thought} of messages left out", self.where)
            yield self._role(name, role_of(name)), content
            return
        named = [(role_of(key), key) for key in message if isinstance(key, str) and role_of(key)]
        named += [(role, key) for key, role in TURN_KEYS.items() if isinstance(message.get(key), str)]
        if not named:
            raise self.no_message(message)
        for role, key in sorted(named, key=lambda one: one[0] != "system"):
            yield self._role(key, role), self.text(message[key])

    def _role(self, name: str, role: str) -> str:
        if not role:
            self.remarks.add("roles not known kept as they are", f"{name[:40]} in {self.where}")
            return name
        role = "assistant" if role == "call" else role
        if name != role:
            self.remarks.add("roles read by their usual names", f"{name[:40]} as {role} in {self.where}")
        return role

    def text(self, content: Any) -> str:
        """The text of a content: a string, a number, or a list of parts; parts of other kinds are left out."""
        if content is None:
            return ""
        if isinstance(content, str):
            return content
        if isinstance(content, (bool, int, float)):
            return _number(content)
        if isinstance(content, (list, tuple)):
            return "".join(map(self._part, content))
        if isinstance(content, Mapping):
            inner = next((content[key] for key in ("text", "content", "parts", "value") if key in content), None)
            return self._part(content) if inner is None else self.text(inner)
        raise self.no_message(content)

    def _part(self, part: Any) -> str:
        if not isinstance(part, Mapping):
            return self.text(part)
        kind = part.get("type")
        if kind in ("tool_use", "tool_call"):
            self.remarks.add("calls of tools written as text", self.where)
            return self._calls(part)
        if kind is None or kind in TEXT_PARTS:
            inner = next((part[key] for key in ("text", "content", "value") if part.get(key) is not None), None)
            if inner is not None:
                return self.text(inner)
        self.remarks.add("images and other parts of messages left out", f"{str(kind)[:40]} in {self.where}")
        return ""

    def _calls(self, value: Any) -> str:
        """Calls of tools as JSON, one a line, each with the name and the arguments."""
        calls = value if isinstance(value, (list, tuple)) else [value]
        return "\n".join(json.dumps(_call(parsed(call)), ensure_ascii=False, default=str) for call in calls)

    def no_message(self, value: Any) -> SourceError:
        """The error for what should be a message and is none."""
        return SourceError(
            f"{self.where}: a message is not one", expected='{"role": "user", "content": "…"}', got=shown(value)
        )


def _call(call: Any) -> Any:
    if not isinstance(call, Mapping):
        return call
    call = call["function"] if isinstance(call.get("function"), Mapping) else call
    arguments = next((call[key] for key in ("arguments", "input", "args", "parameters") if key in call), None)
    return {"name": call.get("name"), "arguments": parsed(arguments)} if "name" in call else dict(call)


def parsed(value: Any) -> Any:
    """A list or object that is written as a text, of JSON or as Python prints it; any other value as it is."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        pass
    if len(value) > MAX_LITERAL:
        return value
    try:
        return ast.literal_eval(value.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return value


def turns(text: str) -> list[Message]:
    """The turns of a chat that is written as one text, ``\\n\\nHuman: … \\n\\nAssistant: …``; none for other text."""
    if not text.lstrip().startswith(("Human:", "System:")):
        return []
    _, *parts = TURN.split("\n\n" + text.strip())
    said = ((role_of(name), content.strip()) for name, content in zip(parts[::2], parts[1::2]))
    return [message for message in said if message[1]]


def _number(value: bool | int | float) -> str:
    try:
        return str(value)
    except ValueError:  # Python writes no whole number of more than some thousand digits
        return hex(int(value))


def shown(value: Any) -> str:
    """A value in an error's line, cut short."""
    try:
        return repr(value)[:80]
    except (RecursionError, ValueError):
        return f"a deep or very large {type(value).__name__}"
