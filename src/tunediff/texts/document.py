"""A document: one text or one conversation."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from tunediff.core.artifacts import LATER, key_of
from tunediff.core.errors import CorpusError


@dataclass(frozen=True)
class Document:
    """One text or one conversation: the unit that is held out and counted.

    Exactly one of `text` and `messages` is given. Raises CorpusError if both or neither is, or if a message is not a
    (role, content) pair of strings.
    """

    id: str
    """Unique and stable: the source's name and a number."""
    kind: str
    """"prose", "chat", "code", "contrastive" or any label of the user's."""
    text: str = ""
    """Plain text; empty when `messages` is set."""
    messages: tuple[tuple[str, str], ...] = ()
    """(role, content) of each turn of a chat; empty when `text` is set."""
    writer: str = ""
    """One of `tunediff.core.axes.WRITERS` where a model wrote the last assistant message; else empty."""
    group: str = ""
    """Documents of one group are on the same side of the train/held-out split. Empty: the document is its own group."""
    prompt_ids: tuple[int, ...] = field(default=(), repr=False, metadata=LATER)
    """Tokens that a model was asked after, leading special tokens included; empty for text that is yet to be encoded."""
    answer_ids: tuple[int, ...] = field(default=(), repr=False, metadata=LATER)
    """Tokens of the model's answer, its end of turn included if it ended; `messages` show them as text."""
    condition: str = field(default="", metadata=LATER)
    """The sort of question that it answers, where a search found it by that; else empty."""

    def __post_init__(self) -> None:
        if bool(self.text) == bool(self.messages):
            raise CorpusError(
                f"document {self.id!r} has {'both' if self.text else 'neither'} text and messages",
                expected="exactly one of them",
            )
        for message in self.messages:
            if len(message) != 2 or not all(isinstance(part, str) for part in message):
                raise CorpusError(
                    f"a message of document {self.id!r} is not a pair",
                    expected="(role, content), both text",
                    got=repr(message)[:80],
                )

    @property
    def is_open(self) -> bool:
        """Whether this is a chat whose last message is not the assistant's."""
        return bool(self.messages) and self.messages[-1][0] != "assistant"

    def answered(
        self,
        content: str,
        writer: str = "",
        kind: str = "contrastive",
        prompt_ids: tuple[int, ...] = (),
        answer_ids: tuple[int, ...] = (),
    ) -> Document:
        """Return this open chat with an answer by the assistant, on the same side of the split as the open one."""
        if not self.is_open:
            raise CorpusError(
                f"document {self.id!r} is not waiting for an answer", expected="a last message by the user"
            )
        return Document(
            id=f"{self.id}/{writer or 'answer'}",
            kind=kind,
            writer=writer,
            group=self.group or self.id,
            messages=(*self.messages, ("assistant", content)),
            prompt_ids=prompt_ids,
            answer_ids=answer_ids,
        )

    @cached_property
    def content_key(self) -> str:
        """A content key of text, messages and token ids alone; the id plays no part."""
        ids = (self.prompt_ids, self.answer_ids)
        return key_of(self.text, self.messages, *(ids if any(ids) else ()))
