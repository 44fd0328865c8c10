"""Sayings: count the answers that say what a finding says, before an edit and after it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tunediff.harvests.asking import Asking, said
from tunediff.models.network import LanguageModel
from tunediff.texts.document import Document
from tunediff.texts.keyness import Words


@dataclass(frozen=True)
class Saying:
    """When an answer says what a finding says: it holds at least so many of the finding's words, each counted once."""

    words: frozenset[str]
    least: int = 1

    @classmethod
    def of(cls, words: Sequence[str], by_tuned: Sequence[str], by_base: Sequence[str]) -> Saying:
        """The number of words that tells tuned's answers from base's best; the smallest of equally good ones."""
        known = frozenset(word.casefold() for word in words)
        mine, theirs = ([_held(known, text) for text in texts] for texts in (by_tuned, by_base))

        def apart(least: int) -> float:
            return _share(mine, least) - _share(theirs, least)

        return cls(known, max(range(1, len(known) + 1), key=lambda least: (apart(least), -least), default=1))

    def is_said(self, text: str) -> bool:
        """Whether an answer says it."""
        return _held(self.words, text) >= self.least

    def rate(self, texts: Sequence[str]) -> list[float]:
        """1 for each answer that says it, 0 for each that does not."""
        return [float(self.is_said(text)) for text in texts]


def answers(asking: Asking, model: LanguageModel, asked: Sequence[Document]) -> list[str]:
    """A model's greedy answers to the prompts of answered chats, as text."""
    made = asking.answers(model, [document.prompt_ids for document in asked])
    return [said(model, [id for id in ids if id not in asking.ends], skip_special_tokens=True) for ids in made]


def _held(words: frozenset[str], text: str) -> int:
    found = Words()
    found.add(text)
    return len(words & found.counts.keys())


def _share(counts: Sequence[int], least: int) -> float:
    return sum(count >= least for count in counts) / max(1, len(counts))
