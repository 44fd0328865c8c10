"""The interface of an elicitor: its `Scope`, and the base class `Elicitor`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tunediff.harvests.questions import Asker, Question, Reply
from tunediff.models.pair import Pair
from tunediff.texts.document import Document


@dataclass(frozen=True, eq=False)
class Scope:
    """What an elicitor searches with.

    asker   asks questions within the elicitor's budget
    words   words that tuned was seen to raise, most raised first
    fills   words of everyday questions, to fill forms with
    chats   chats that base answered, for questions that come later in a chat
    own     documents of the user's own data; empty where the run reads what ships
    """

    asker: Asker
    words: Sequence[str] = ()
    fills: Sequence[str] = ()
    chats: Sequence[Document] = ()
    own: Sequence[Document] = ()
    seed: int = 0

    @property
    def pair(self) -> Pair:
        """Both models."""
        return self.asker.asking.pair

    @property
    def left(self) -> int:
        """The number of questions that may yet be asked."""
        return self.asker.budget

    def ask(self, questions: Iterable[Question]) -> list[Reply]:
        """Replies to the questions, as far as the budget goes; those that are kept for testing are passed over."""
        return self.asker.ask(questions)


@dataclass(frozen=True)
class Elicitor(ABC):
    """Base class of elicitors: a dataclass of settings with a method `search`.

    An elicitor's name is its file's name or its import path. Each setting is ``elicit.NAME.field``, with a docstring under
    it.
    """

    @abstractmethod
    def search(self, scope: Scope) -> None:
        """Ask questions until nothing promising is left or the budget is spent. The asker keeps every reply."""
