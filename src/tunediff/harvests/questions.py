"""Questions that a search asks both models, and how far apart the models are on tuned's answers."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from tunediff.core.chance import seed_of
from tunediff.core.errors import CorpusError
from tunediff.harvests.asking import Asking, among, answer_divergence
from tunediff.texts.corpus import Corpus
from tunediff.texts.document import Document

GAP = "{}"
"""The place of a word in a form of questions."""
WORD = re.compile(r"[^\W\d_]{4,}")
"""A word that a form can be filled with."""
PRIOR = 1.0
"""Number of usual replies that a mean is drawn to."""


@dataclass(frozen=True)
class Question:
    """One question: what the user says last, and what was said before.

    form   the kind of question: a text with `GAP` for the word, or the question itself
    word   what the form is filled with; empty for a question of its own
    group  `Document.group` of the document that it comes from, on whose side of the split it then is; else empty
    """

    form: str
    word: str = ""
    before: tuple[tuple[str, str], ...] = ()
    group: str = ""

    @property
    def text(self) -> str:
        """What the user says."""
        return self.form.replace(GAP, self.word) if self.word else self.form

    @property
    def document(self) -> Document:
        """The question as an open chat, whose id depends on its text alone."""
        messages = (*self.before, ("user", self.text))
        id = "elicited/" + hashlib.sha256(repr(messages).encode()).hexdigest()[:12]
        return Document(id, "chat", messages=messages, group=self.group)


@dataclass(frozen=True)
class Reply:
    """Tuned's greedy answer to a question, and KL(tuned || base) over its tokens, nat a token."""

    question: Question
    document: Document
    kl: float


@dataclass(eq=False)
class Asker:
    """Asks questions within a budget, and keeps every reply. A question counts once, however often it is asked.

    While a search goes on, questions on the held-out side of the split are passed over, so that what is found can be tested
    on questions that did not choose it.

    split      the corpus whose split sides questions belong to
    budget     number of questions that may yet be asked
    progress   called with the number of questions that were just answered
    replies    every reply, by the id of its question's document
    kept       questions that were passed over, by the same id
    spoiled    ids of questions that an elicitor chose by looking at what the models answer; they test nothing
    """

    asking: Asking
    split: Corpus
    budget: int
    progress: Callable[[int], None] | None = None
    replies: dict[str, Reply] = field(default_factory=dict)
    kept: dict[str, Question] = field(default_factory=dict)
    spoiled: set[str] = field(default_factory=set)

    def is_held_out(self, question: Question) -> bool:
        """On which side of the split a question is."""
        return self.split.is_held_out(question.document)

    def ask(self, questions: Iterable[Question], held_out: bool = False) -> list[Reply]:
        """Replies to those questions that are on the side asked for and within the budget, or were asked before."""
        mine: dict[str, Question] = {}
        for question in (q for q in questions if q.text.strip()):
            side = mine if self.is_held_out(question) == held_out else self.kept
            side[question.document.id] = question
        new = [q for id, q in mine.items() if id not in self.replies][: self.budget]
        if new:
            self.budget -= len(new)
            for reply in self._replies(new):
                self.replies[reply.question.document.id] = reply
            if self.progress:
                self.progress(len(new))
        return [self.replies[id] for id in mine if id in self.replies]

    def _replies(self, questions: Sequence[Question]) -> list[Reply]:
        asking, pair = self.asking, self.asking.pair
        try:
            asked = asking.encoded(among(self.split, [q.document for q in questions]))
        except CorpusError:
            return []  # none of them fits, or the template takes none
        answers = asking.answers(pair.tuned, asked.rows)
        made = [
            (questions[d], asking.document(asked.documents[d], "tuned", row, answer))
            for d, row, answer in zip(asked.document_R, asked.rows, answers)
        ]
        tokens = among(self.split, [document for _, document in made]).tokens(
            pair.tokenizer, row_tokens=asking.room + asking.tokens, template=asking.template
        )
        kl = dict(zip(tokens.document_R, answer_divergence(pair, tokens).tolist()))
        return [Reply(question, document, kl[n]) for n, (question, document) in enumerate(made) if n in kl]


def mean_by(replies: Iterable[Reply], name: Callable[[Question], str]) -> list[tuple[str, float]]:
    """The mean divergence of the replies to questions of each name that is not empty, largest first.

    A mean of few is drawn to that of all, as `PRIOR` more replies would do, so that one odd answer is no finding.
    """
    replies = list(replies)
    if not replies:
        return []
    usual = sum(reply.kl for reply in replies) / len(replies)
    sums: dict[str, list[float]] = {}
    for reply in replies:
        sums.setdefault(name(reply.question), []).append(reply.kl)
    means = ((n, (sum(kl) + PRIOR * usual) / (len(kl) + PRIOR)) for n, kl in sums.items() if n)
    return sorted(means, key=lambda one: -one[1])


def above_form(replies: Iterable[Reply]) -> list[Reply]:
    """Each reply with what its divergence is above the mean of the other replies to its form: what its word does.

    A form of which there is no other reply tells nothing, so its reply counts 0.
    """
    replies = list(replies)
    sums: dict[str, float] = {}
    for reply in replies:
        sums[reply.question.form] = sums.get(reply.question.form, 0.0) + reply.kl
    counts = Counter(reply.question.form for reply in replies)
    made = []
    for reply in replies:
        others = counts[reply.question.form] - 1
        rest = (sums[reply.question.form] - reply.kl) / others if others else reply.kl
        made.append(replace(reply, kl=max(0.0, reply.kl - rest)))
    return made


def telling_words(documents: Iterable[Document], seed: int) -> list[str]:
    """Words of at least four letters that at most two open chats say, in an order fixed by `seed`.

    What many of them say is mostly grammar. Capital letters are kept apart, as are all scripts that put spaces between
    words.
    """
    said = Counter(word for d in documents if d.is_open for word in set(WORD.findall(d.messages[-1][1])))
    return sorted((word for word, count in said.items() if count <= 2), key=lambda word: seed_of(seed, "word", word))
