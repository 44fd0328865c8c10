"""Conditions: questions that a search found on which both models' answers differ far more than elsewhere."""

from __future__ import annotations

from dataclasses import dataclass, field

from tunediff.records.measure import Measure


@dataclass(frozen=True)
class Answered:
    """One question with both models' greedy answers."""

    question: str
    base: str
    tuned: str


@dataclass(frozen=True)
class Condition:
    """A sort of question on which both models' answers differ.

    asked        the form of the questions, with {} for a word; or the one word that they share; or one question
    elicitor     which elicitor found it
    divergence   KL(tuned || base) on tuned's answers to questions that did not choose it, nat a token; the control is that
                 of everyday questions
    documents    ids of the documents that its questions and answers became, without the writer
    answers      some of these questions with both answers
    """

    asked: str
    elicitor: str
    divergence: Measure
    documents: list[str] = field(default_factory=list)
    answers: list[Answered] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """How many times as far apart the models are here as on everyday questions; 0 where that is not known."""
        own, elsewhere = self.divergence.value, self.divergence.control
        return own / elsewhere if own and elsewhere else 0.0
