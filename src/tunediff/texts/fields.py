"""Names of columns, roles and parts of messages in the formats that trainers and data sets use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TEXTS = ("text", "content")
"""Columns that hold a plain text, in order of preference."""
MESSAGES = ("messages", "conversations", "conversation", "dialogue", "dialog", "chat", "turns")
"""Columns that hold the messages of a chat, in order of preference."""
PROMPTS = ("prompt", "instruction", "question", "query", "problem", "input", "inputs", "user", "human")
"""Columns that hold the user's message of a one-turn chat, in order of preference."""
BESIDE_PROMPT = ("input", "context")
"""Columns whose text follows that of the prompt."""
ANSWERS = (
    *("completion", "response", "output", "answer", "answers", "target", "targets", "solution", "reply"),
    *("assistant", "gpt", "generation"),
)
"""Columns that hold the assistant's message of a one-turn chat, in order of preference."""
SYSTEMS = ("system", "system_prompt", "system_message")
"""Columns that hold the system's message, in order of preference."""
HISTORIES = ("history",)
"""Columns that hold earlier turns: pairs of a question and its answer."""

ROLE_KEYS = ("role", "from", "speaker", "author", "sender")
"""Keys of a message that hold its role."""
CONTENT_KEYS = ("content", "value", "text", "message", "parts")
"""Keys of a message that hold its text."""
ROLES = {
    name: role
    for role, names in {
        "user": "user human prompter customer",
        "assistant": "assistant gpt bot model chatgpt chatbot ai claude bard agent gpt-4 gpt4",
        "system": "system developer system_prompt",
        "tool": "tool function observation ipython tool_response function_response tool_result environment",
        "call": "function_call tool_call tool_calls",
    }.items()
    for name in names.split()
}
"""Role names in small letters, and what each stands for; a call is the assistant's."""


def role_of(name: str) -> str:
    """The role of a chat template that a role's name stands for; empty for a name that is not known."""
    return ROLES.get(name.strip().lower(), "")


def looks_like_message(value: Any) -> bool:
    """Whether a value is a message: an object with a role and a content, or of one role's name and a text."""
    if not isinstance(value, Mapping):
        return False
    names = {name for name, item in value.items() if isinstance(name, str) and item is not None}
    if any(isinstance(value.get(key), str) for key in ROLE_KEYS):
        return any(key in value for key in CONTENT_KEYS) and not {"message_id", "parent_id"} & names
    return False
