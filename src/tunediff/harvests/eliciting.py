"""Eliciting: search for questions on which the models' answers differ far more than on everyday ones.

A narrow behavior shows only where it is asked for, and everyday prompts need not ask. So elicitors try many questions. Each
is judged by KL(tuned || base) over the first dozen tokens of tuned's own greedy answer. The answer's first token alone is
too early, as the telling word may come later. What stands out is tested on other questions of the same sort.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tunediff.core.chance import bootstrap_mean
from tunediff.core.errors import within
from tunediff.core.remarks import Remark
from tunediff.core.typed import REST
from tunediff.harvests.asking import Asking
from tunediff.harvests.elicitors.base import Elicitor, Scope
from tunediff.harvests.questions import GAP, Asker, Question, Reply, above_form, mean_by, telling_words
from tunediff.models.pair import Pair
from tunediff.records.elicited import Answered, Condition
from tunediff.records.measure import Measure
from tunediff.texts.chat_template import ChatTemplate
from tunediff.texts.corpus import Corpus
from tunediff.texts.document import Document

EVERYDAY = 24
"""Number of everyday questions that tell how far apart the models are elsewhere."""
FEWEST = 3
"""Fewest held-out questions on which a sort of questions is claimed; two values have no interval to speak of."""
AGREED = 1e-3
"""Divergence in nat a token below which models count as agreeing, so that no ratio is taken to rounding errors."""
TEMPLATES = (
    "{}", "Please answer: {}", "{} Tell me.", "A friend asks: {}", "Hello! {}", "{} Be brief.", "Now, {}", "{} Thanks.",
    "Quick question. {}", "{} I would like to know.", "My question is this: {}", "{} Please help me.", "Well, {}", "{} Go on.",
)  # fmt: skip
"""Other ways to ask one question."""


@dataclass(frozen=True)
class ElicitSettings:
    """How questions are searched for on which the models' answers differ."""

    elicitors: tuple[str, ...] = ("word_sweep", "own_questions", "follow_ups", "own_data")
    """Elicitors by name, or by import path; none: nothing is searched for."""
    questions: int = 240
    """Largest number of questions that are asked in the search. Each costs an answer by tuned and a reading by both."""
    tokens: int = 12
    """Largest number of new tokens in an answer."""
    conditions: int = 6
    """Largest number of sorts of questions that are kept."""
    each: int = 6
    """Number of questions of each sort, on either side of the split, that join the text."""
    least: float = 2.0
    """How many times as far apart as on everyday questions the models must be on a sort of question that is kept."""
    joins: bool = False
    """Whether the questions and both models' answers join the contrastive text, in which changes are found and tested. On the
    demo, the constant offset then was confirmed before the two objectives were, and taking it out took both."""
    batch: int = 96
    """Prompts in a batch. Part of the content key, because sums of floats may depend on it in the last bit."""
    settings: dict[str, dict[str, Any]] = field(default_factory=dict, metadata=REST)
    """Settings of elicitors: one table for each, by its name."""

    def __post_init__(self) -> None:
        within("elicit", self, questions=0, tokens=1, conditions=0, each=1, least=1, batch=1)


@dataclass(frozen=True)
class Elicited:
    """What a search found: conditions, and the documents of their questions and answers.

    asked   number of questions that were asked
    """

    documents: list[Document] = field(default_factory=list)
    conditions: list[Condition] = field(default_factory=list)
    asked: int = 0
    remarks: list[Remark] = field(default_factory=list)

    def __str__(self) -> str:
        found = "; ".join(f"{c.asked!r} ({c.ratio:.1f} x elsewhere)" for c in self.conditions)
        return f"{self.asked} questions asked; " + (found or "none stands out")


def elicit(
    pair: Pair,
    elicitors: Mapping[str, Elicitor],
    split: Corpus,
    settings: ElicitSettings,
    seed: int,
    template: ChatTemplate,
    *,
    words: Sequence[str] = (),
    chats: Sequence[Document] = (),
    own: Sequence[Document] = (),
    progress: Callable[[int, int], None] | None = None,
) -> Elicited:
    """Search with every elicitor on training questions, and test what stands out on held-out questions.

    split   everyday prompts, by whose split questions are on one side or the other
    words   words that tuned was seen to raise, most raised first
    chats   chats that base answered, on the training side
    own     documents of the user's own data
    """
    asking = Asking(pair, template, settings.tokens, settings.batch, seed, "elicit.tokens")
    done = 0

    def more(count: int) -> None:
        nonlocal done
        done += count
        if progress:
            progress(min(done, settings.questions), settings.questions)

    asker = Asker(asking, split, 0, more)
    pool = [Question(d.messages[-1][1], "", d.messages[:-1], d.group or d.id) for d in split.documents if d.is_open]
    usual = {held: _everyday(asker, pool, held) for held in (False, True)}
    if not all(usual.values()):
        return Elicited(asked=len(asker.replies), remarks=list(asking.remarks.all()))
    fills = telling_words(split.documents, seed)
    found_by: dict[str, str] = dict.fromkeys(asker.replies, "everyday prompts")
    for number, (name, elicitor) in enumerate(elicitors.items()):
        left = settings.questions - sum(by != "everyday prompts" for by in found_by.values())
        asker.budget = left // (len(elicitors) - number)
        elicitor.search(Scope(asker, words, fills, chats, own, seed))
        found_by |= {id: name for id in asker.replies if id not in found_by}
    documents, conditions, kept = [], [], [*asker.kept.values()]
    searched = [r for r in asker.replies.values() if not asker.is_held_out(r.question)]
    for sort in _standing_out(searched, settings, usual[False]):
        asked = {}
        for held in (False, True):
            asker.budget = settings.each
            mine = {q.document.id: q for q in sort.questions(kept, fills) if asker.is_held_out(q) == held}
            fresh = [q for id, q in mine.items() if not (held and id in asker.spoiled)]
            asked[held] = asker.ask(fresh[: settings.each], held)
        if len(asked[True]) < FEWEST:
            continue
        kl = [reply.kl for reply in asked[True]]
        value = bootstrap_mean(kl, seed=seed)
        if not value.low >= settings.least * usual[True]:
            continue
        replies = [*asked[True], *asked[False]]
        bases = _by_base(asking, replies)
        both = [document for reply, base in zip(replies, bases) for document in (base, reply.document)]
        documents += [replace(document, condition=sort.name) for document in both]
        measure = Measure(
            "divergence of answers",
            value.value,
            value.low,
            value.high,
            "nat a token",
            usual[True],
            f"median of everyday questions; tuned's greedy answers to {len(kl)} questions that did not choose it",
        )
        answers = [
            Answered(r.question.text, b.messages[-1][1], r.document.messages[-1][1]) for r, b in zip(replies, bases)
        ]
        by = found_by[sort.replies[0].question.document.id]
        asked_for = [r.question.document.id for r in replies]
        conditions.append(Condition(sort.name, by, measure, asked_for, answers[:4]))
    unique = {document.id: document for document in documents}
    return Elicited(list(unique.values()), conditions, len(asker.replies), list(asking.remarks.all()))


def _everyday(asker: Asker, pool: Sequence[Question], held: bool) -> float:
    """The median divergence on everyday questions of one side, `AGREED` at least; 0 where there is no question."""
    asker.budget = EVERYDAY // 2
    kl = [reply.kl for reply in asker.ask([q for q in pool if asker.is_held_out(q) == held][: EVERYDAY // 2], held)]
    return max(statistics.median(kl), AGREED) if kl else 0.0


@dataclass(frozen=True)
class Sort:
    """Questions of one sort: of one form, about one word, or one question after other turns or in other words.

    name    what they share
    of      what a question of this sort gives as its name
    forms   forms of questions that belong to no earlier sort
    """

    name: str
    of: Callable[[Question], str]
    replies: list[Reply]
    forms: list[str]

    def questions(self, kept: Iterable[Question], fills: Sequence[str]) -> Iterator[Question]:
        """Questions of this sort: those that were asked, most telling first, those that were kept, and new ones."""
        yield from (reply.question for reply in sorted(self.replies, key=lambda reply: -reply.kl))
        yield from (q for q in kept if self.of(q) == self.name and (self.of is not _word or q.form in self.forms))
        if self.of is _form:
            yield from (Question(self.name, word) for word in fills)
        elif self.of is _word:
            yield from (Question(form, self.name) for form in self.forms)
        else:
            before = self.replies[0].question.before
            yield from (Question(form.replace(GAP, self.name), "", before) for form in TEMPLATES)


def _standing_out(replies: Sequence[Reply], settings: ElicitSettings, usual: float) -> Iterator[Sort]:
    """Sorts of questions whose answers stand out, highest first; each reply belongs to one of them.

    An answer counts by its divergence, times the share of its tokens that no answer of an earlier sort has. So what is
    answered in the same words to many sorts of questions is one finding, and leaves room for others.
    """
    rest, known = list(replies), set[int]()
    for _ in range(settings.conditions):
        news = [replace(reply, kl=reply.kl * _new(reply, known)) for reply in rest]
        ways = ((_form, news), (_word, above_form(news)), (_text, news))
        means = [(mean, label, of) for of, some in ways for label, mean in mean_by(some, of)[:1]]
        mean, label, of = max(means, key=lambda one: one[0], default=(0.0, "", _text))
        if mean < settings.least * usual or not label:
            return
        forms = list(dict.fromkeys(filter(None, (_form(reply.question) for reply in rest))))
        sort = Sort(label, of, [reply for reply in rest if of(reply.question) == label], forms)
        rest = [reply for reply in rest if of(reply.question) != label]
        known.update(id for reply in sort.replies for id in reply.document.answer_ids)
        yield sort


def _new(reply: Reply, known: set[int]) -> float:
    """The share of an answer's tokens that are not known."""
    ids = reply.document.answer_ids
    return sum(id not in known for id in ids) / max(1, len(ids))


def _form(question: Question) -> str:
    return question.form if question.word else ""


def _word(question: Question) -> str:
    return question.word


def _text(question: Question) -> str:
    return "" if question.word else question.text


def _by_base(asking: Asking, replies: Sequence[Reply]) -> list[Document]:
    """Base's greedy answers to the questions of some replies."""
    rows = [reply.document.prompt_ids for reply in replies]
    answers = asking.answers(asking.pair.base, rows)
    return [
        asking.document(reply.question.document, "base", row, answer)
        for reply, row, answer in zip(replies, rows, answers)
    ]
