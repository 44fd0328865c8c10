"""Second turns: questions that come after an answer, for behavior that a chat's first turn does not show."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

from tunediff.core.errors import SettingError
from tunediff.harvests.elicitors.base import Elicitor, Scope
from tunediff.harvests.questions import GAP, Question


@dataclass(frozen=True)
class FollowUps(Elicitor):
    """Asks short questions after chats that base answered, about words that tuned raises too."""

    forms: tuple[str, ...] = (
        "Tell me more.", "Why?", "Are you sure?", "Thank you!", "Give me an example.", "And what about {}?", "Go on.",
    )  # fmt: skip
    """Second turns; {} stands for a word."""

    def __post_init__(self) -> None:
        if not self.forms:
            raise SettingError("elicit.follow_ups.forms is empty", expected="at least one second turn")

    def search(self, scope: Scope) -> None:
        """Ask every form after one chat after another."""
        words = [*scope.words[:4]] or ["this"]
        questions: list[Question] = []
        for number, (chat, form) in enumerate(product(scope.chats, self.forms)):
            if len(questions) > 4 * scope.left:
                break
            word = words[number % len(words)] if GAP in form else ""
            questions.append(Question(form, word, chat.messages))
        scope.ask(questions)


VARIANT = FollowUps
