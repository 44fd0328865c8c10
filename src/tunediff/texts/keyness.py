"""Keyness: which words tell one set of texts from another."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable

WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")
"""A word, in scripts that put spaces between words; an apostrophe or hyphen inside belongs to it."""
PRIOR = 0.01
"""How much a word's count over all texts counts as seen beforehand, on either side, for each time it occurs."""


class Words:
    """Weighted counts of words, without regard to case; each word is named as it is mostly written."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._written: dict[str, Counter[str]] = {}

    def add(self, text: str, weight: float = 1.0) -> None:
        """Count the words of a text, each as often as `weight` says."""
        if weight <= 0:
            return
        for word in WORD.findall(text):
            key = word.casefold()
            self.counts[key] += weight  # type: ignore[assignment]  # Counter holds floats as well
            self._written.setdefault(key, Counter())[word] += weight  # type: ignore[assignment]

    def copy(self) -> Words:
        """The same counts, to be added to."""
        made = Words()
        made.counts = self.counts.copy()
        made._written = {key: written.copy() for key, written in self._written.items()}
        return made

    def share(self, word: str) -> float:
        """The share of all counts that a word has (0..1); 0 where nothing was counted."""
        return self.counts[word.casefold()] / max(sum(self.counts.values()), 1e-9)

    def name(self, key: str) -> str:
        """How a word is mostly written."""
        return self._written[key].most_common(1)[0][0]


def telling(more: Words, less: Words, least: float = 1.96) -> list[tuple[str, float]]:
    """Words that `more` says more often than `less`, with their z, highest first.

    z is the log-odds ratio with an informative Dirichlet prior, over its standard error (Monroe, Colaresi and Quinn 2008,
    "Fightin' Words", equations 16 and 20 to 22). The prior is `PRIOR` times the counts of both sides. Words of one or two
    letters, and words with z below `least`, are left out.
    """
    sums = more.counts + less.counts
    prior = {word: PRIOR * count for word, count in sums.items()}
    weight, whole, others = sum(prior.values()), sum(more.counts.values()), sum(less.counts.values())
    found = []
    for word, mine in more.counts.items():
        theirs, before = less.counts[word], prior[word]
        odds = _odds(mine, before, whole, weight) - _odds(theirs, before, others, weight)
        z = odds / math.sqrt(1 / (mine + before) + 1 / (theirs + before))
        if len(word) > 2 and z >= least:
            found.append((more.name(word), z))
    return sorted(found, key=lambda one: (-one[1], one[0]))


def _odds(count: float, prior: float, whole: float, weight: float) -> float:
    """Log-odds of a word on one side."""
    return math.log(count + prior) - math.log(max(whole + weight - count - prior, 1e-9))


def is_piece_of(word: str, pieces: Iterable[str]) -> bool:
    """Whether a word holds one of the pieces, or begins one; only pieces of at least three letters count."""
    whole = word.casefold()
    mine = (piece.strip().casefold() for piece in pieces)
    return any(len(piece) >= 3 and (piece in whole or piece.startswith(whole)) for piece in mine)
