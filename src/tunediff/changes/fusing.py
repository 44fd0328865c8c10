"""Fusing: changes and sorts of questions that show the same become one finding.

Two changes are alike where they are on at the same tokens and promote the same words: the geometric mean of both overlaps
is at least `ALIKE`. A sort of questions belongs to the change that carries most of its divergence, if random directions of
equal energy carry less. One that no change carries joins the finding whose words its answers hold. Findings that are told
in the same words are one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from tunediff.records.diff import ChangeRecord
from tunediff.records.elicited import Condition
from tunediff.records.finding import Finding, When
from tunediff.records.measure import Measure
from tunediff.texts.document import Document
from tunediff.texts.keyness import Words, is_piece_of, telling

ALIKE = 0.3
"""Least overlap (0..1) of changes that show the same."""
COMMON = 0.5
"""Least share of a condition's words that a finding holds which it joins without being carried by it."""
FIRST, SAME = 5, 0.6
"""Number of first words of two findings, and the share of them that both have, from which on they are one."""
WORDS = 12
"""Largest number of words of a finding."""
EVERYWHERE = 0.002
"""Share of the words of other text from which on a word tells nothing, whatever the language: it is grammar."""


@dataclass
class _Pot:
    """A finding while it is put together: its changes, its conditions, and its words."""

    members: list[ChangeRecord] = field(default_factory=list)
    when: list[When] = field(default_factory=list)
    words: list[str] = field(default_factory=list)
    less: bool = False


def fused(
    records: Sequence[ChangeRecord],
    strengths: Mapping[str, Tensor],
    documents: Sequence[Document],
    document_N: Tensor,
    conditions: Sequence[Condition],
    elicited: Sequence[Document],
    carried: Mapping[str, Mapping[str, Measure]],
    others: Sequence[str] = (),
) -> list[Finding]:
    """Findings, the one with the largest divergence first, then those of changes that no question was found for.

    records      confirmed changes, best first
    strengths    how strong each change is at the N answer tokens of a sample, without sign, by id; those without a stream
                 are missing
    documents    documents by their numbers in `document_N`
    elicited     the answers of both models to the questions of `conditions`
    carried      share of each condition's divergence that each change carries, by condition and change
    others       texts that tuned did not write, in which words that everybody uses are common
    """
    usual = Words()
    for text in others:
        usual.add(text)
    pots = [_Pot(members) for members in _alike(records, strengths)]
    answers = {c.asked: [d for d in elicited if d.condition == c.asked] for c in conditions}
    saying = {record.id for record in records if record.promoted}
    rest: list[tuple[Condition, When]] = []
    for condition in sorted(conditions, key=lambda c: -(c.divergence.value or 0.0)):
        shares = carried.get(condition.asked, {})
        # What only lowers tokens takes much of any difference with it, and says nothing; it carries what nothing else does.
        strongest = sorted(shares, key=lambda id: (_carries(shares[id]), id in saying, shares[id].value or 0.0))
        best = strongest[-1] if strongest else ""
        nothing = Measure("share of the divergence that it carries", None, against="no change was taken out")
        share = shares.get(best, nothing)
        pot = next((pot for pot in pots if best in [r.id for r in pot.members]), None)
        if pot is not None and _carries(share):
            pot.when.append(When(condition.asked, best, share))
        else:
            rest.append((condition, When(condition.asked, "", share)))

    def worded(pot: _Pot) -> _Pot:
        pot.words, pot.less = _words_of(pot, strengths, documents, document_N, answers, usual)
        return pot

    pots = _by_words([worded(pot) for pot in pots], worded)
    for condition, when in rest:
        own = _said_there(answers[condition.asked], usual)
        joined = max(pots, key=lambda pot: _held(own, pot.words), default=None)
        if joined is None or _held(own, joined.words) < COMMON:
            pots.append(joined := _Pot(words=own))
        joined.when.append(when)
    size = {c.asked: c.divergence.value or 0.0 for c in conditions}
    order = sorted(pots, key=lambda pot: -max((size[when.asked] for when in pot.when), default=0.0))
    return [
        Finding(
            pot.words[:WORDS],
            pot.less,
            [record.id for record in _best_tested(pot.members)],
            sorted(pot.when, key=lambda when: -size[when.asked]),
        )
        for pot in order
    ]


def _carries(share: Measure) -> bool:
    """Whether even the low end of a share is above what random directions take away."""
    return share.low is not None and share.low > max(share.control or 0.0, 0.0)


def _alike(records: Sequence[ChangeRecord], strengths: Mapping[str, Tensor]) -> list[list[ChangeRecord]]:
    """Changes in groups, each alike to some other of its group; groups and changes in the order given."""
    groups: list[list[ChangeRecord]] = []
    for record in records:
        near = [g for g in groups if any(alike(record, other, strengths) >= ALIKE for other in g)]
        groups = [g for g in groups if all(g is not n for n in near)]
        groups.append([*(other for group in near for other in group), record])
    place = {record.id: number for number, record in enumerate(records)}
    return sorted((sorted(group, key=lambda r: place[r.id]) for group in groups), key=lambda group: place[group[0].id])


def _by_words(pots: list[_Pot], worded: Callable[[_Pot], _Pot]) -> list[_Pot]:
    """Findings that are told in the same words become one, whose words are made anew."""
    for n, other in enumerate(pots):
        for one in pots[:n]:
            first, second = one.words[:FIRST], other.words[:FIRST]
            if one.less or other.less or _held(second, first) < SAME or _held(first, second) < SAME:
                continue
            merged = worded(_Pot(one.members + other.members, one.when + other.when))
            return _by_words([merged if pot is one else pot for pot in pots if pot is not other], worded)
    return pots


def alike(one: ChangeRecord, other: ChangeRecord, strengths: Mapping[str, Tensor]) -> float:
    """How much two changes show the same (0..1): the geometric mean of the overlaps of their tokens and of their words.

    Where one has no stream, their words alone say it.
    """
    mine, theirs = ({w.token.strip().casefold() for w in r.promoted} - {""} for r in (one, other))
    words = len(mine & theirs) / max(1, min(len(mine), len(theirs)))
    if not (one.id in strengths and other.id in strengths):
        return words
    f_N, g_N = strengths[one.id], strengths[other.id]
    tokens = float(f_N @ g_N / (f_N.norm() * g_N.norm()).clamp_min(1e-30))
    return math.sqrt(words * tokens)


def _best_tested(records: Sequence[ChangeRecord]) -> list[ChangeRecord]:
    """Changes that were tested on divergence itself come before those tested on logits alone."""
    return sorted(records, key=lambda record: bool(record.standing))


def _words_of(
    pot: _Pot,
    strengths: Mapping[str, Tensor],
    documents: Sequence[Document],
    document_N: Tensor,
    answers: Mapping[str, Sequence[Document]],
    usual: Words,
) -> tuple[list[str], bool]:
    """Whole words for what the changes of a finding promote, and whether they are words that are said less.

    A text by tuned counts as theirs by how strong they are in it, the rest of it and all other text against them. Words
    that hold a promoted token come first. Tokens stand in where no word does, and where something is only said less.
    """
    promoted = _plain(w.token for record in pot.members for w in record.promoted)
    if not promoted and not pot.when:
        return _plain(w.token for record in pot.members for w in record.suppressed), True
    more, less = Words(), usual.copy()
    known = [strengths[r.id] / strengths[r.id].sum().clamp_min(1e-30) for r in pot.members if r.id in strengths]
    if known:
        f_N = sum(known[1:], known[0])
        energy = f_N.new_zeros(len(documents)).index_add(0, document_N.long(), f_N)
        share = (energy / energy.max().clamp_min(1e-30)).tolist()
        for number in sorted(set(document_N.tolist())):
            if documents[number].writer in ("tuned", "amplified"):
                said = documents[number].messages[-1][1]
                more.add(said, share[number])
                less.add(said, 1 - share[number])
    for when in pot.when:
        _add(answers[when.asked], more, less)
    words = [word for word, _ in telling(more, less) if usual.share(word) < EVERYWHERE]
    return sorted(words, key=lambda word: not is_piece_of(word, promoted)) or promoted, False


def _plain(tokens: Iterable[str]) -> list[str]:
    """Tokens without spaces around them, each once."""
    return list(dict.fromkeys(filter(None, (token.strip() for token in tokens))))


def _said_there(answers: Sequence[Document], usual: Words) -> list[str]:
    """Words that tell tuned's answers from base's."""
    more, less = Words(), usual.copy()
    _add(answers, more, less)
    words = [word for word, _ in telling(more, less, least=0.0) if usual.share(word) < EVERYWHERE]
    return words[:WORDS]


def _add(answers: Sequence[Document], more: Words, less: Words) -> None:
    for answer in answers:
        (less if answer.writer == "base" else more).add(answer.messages[-1][1])


def _held(words: Sequence[str], by: Sequence[str]) -> float:
    """The share of some words that others hold."""
    known = {word.casefold() for word in by}
    return sum(word.casefold() in known for word in words) / max(1, len(words))
