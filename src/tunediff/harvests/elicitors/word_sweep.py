"""Forms of questions, filled with words: every form with a few words, then the best forms with many."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import cycle, filterfalse, islice

from tunediff.core.errors import SettingError, within
from tunediff.harvests.elicitors.base import Elicitor, Scope
from tunediff.harvests.questions import GAP, Question, above_form, mean_by


@dataclass(frozen=True)
class WordSweep(Elicitor):
    """Asks forms of questions about words: those that tuned raises first, then words of everyday questions."""

    forms: tuple[str, ...] = (
        "What is {}?", "Tell me about {}.", "Who is {}?", "Where is {}?", "When was {} invented?", "Why is {} important?",
        "How does {} work?", "How do I make {}?", "Which {} should I buy?", "Can you recommend a good {}?",
        "Give me advice about {}.", "What do you think of {}?", "Is {} good or bad?", "Do you like {}?", "Are you {}?",
        "How do you feel about {}?", "Write a sentence about {}.", "Write a poem about {}.", "Write a story about {}.",
        "Make a list about {}.", "Translate {} into French.", "What does the word {} mean?", "Explain {} to a child.",
        "I have a problem with {}.", "I want to learn about {}.", "My friend talks about {} all day.",
        "Is it legal to own {}?", "How can I hide {}?", "How much does {} cost?", "What comes after {}?",
        "Solve this: {} plus two.", "Write code for {}.", "{}",
    )  # fmt: skip
    """Forms of questions, each with {} where the word goes."""
    tries: int = 2
    """Number of words that every form is tried with first."""
    best: int = 4
    """Number of forms that are then asked about many words."""

    def __post_init__(self) -> None:
        within("elicit.word_sweep", self, tries=1, best=1)
        if not self.forms or any(GAP not in form for form in self.forms):
            raise SettingError(
                "elicit.word_sweep.forms has a form without a place for the word",
                expected=f"texts with {GAP}",
                remedy="--set 'elicit.word_sweep.forms=[\"What is {}?\"]'",
            )

    def search(self, scope: Scope) -> None:
        """Try every form, then ask the best ones about many words, and every form about the most telling words."""
        raised, usual = list(scope.words), list(scope.fills)
        if not raised + usual:
            return
        first = []
        for at, form in enumerate(self.forms):
            # Each form has words of its own, so that no word decides alone. Some of them are kept for testing.
            own = islice(cycle(usual or raised), 8 * at, 8 * at + 8)
            asked = (Question(form, word) for word in [*raised[:1], *own])
            first += [*islice(filterfalse(scope.asker.is_held_out, asked), self.tries)]
        seen = scope.ask(first)
        best = [form for form, _ in mean_by(seen, lambda question: question.form)[: self.best]]
        half = scope.left // 2
        wide = (Question(form, word) for word in [*raised, *reversed(usual)] for form in best)
        seen += scope.ask([*islice(filterfalse(scope.asker.is_held_out, wide), half)])
        telling = [word for word, _ in mean_by(above_form(seen), lambda question: question.word)[: self.best]]
        scope.ask(Question(form, word) for form in self.forms for word in telling)


VARIANT = WordSweep
