"""The user's own data: chats without their last answer, and the openings of texts."""

from __future__ import annotations

from dataclasses import dataclass

from tunediff.core.errors import within
from tunediff.harvests.elicitors.base import Elicitor, Scope
from tunediff.harvests.questions import Question
from tunediff.texts.document import Document


@dataclass(frozen=True)
class OwnData(Elicitor):
    """Asks what the user's own chats ask, and lets the models go on with the openings of the user's texts.

    An opening is said in a user's turn, because that is where both models are asked.
    """

    words: int = 24
    """Number of words in an opening."""

    def __post_init__(self) -> None:
        within("elicit.own_data", self, words=1)

    def search(self, scope: Scope) -> None:
        """Ask them in the order of the data, evenly spread over it."""
        stride = max(1, len(scope.own) // max(1, 2 * scope.left))
        scope.ask(filter(None, map(self._question, scope.own[::stride])))

    def _question(self, document: Document) -> Question | None:
        group = document.group or document.id  # a question is on the side of the document that it comes from
        if document.messages:
            turns = document.messages if document.is_open else document.messages[:-1]
            return Question(turns[-1][1], "", turns[:-1], group) if turns and turns[-1][0] == "user" else None
        return Question(" ".join(document.text.split()[: self.words]), group=group)


VARIANT = OwnData
