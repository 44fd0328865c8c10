"""Findings: what was found, told once, however many changes and questions show it."""

from __future__ import annotations

from dataclasses import dataclass, field

from tunediff.records.measure import Measure


@dataclass(frozen=True)
class When:
    """A sort of question on which a finding shows.

    asked      `Condition.asked`
    carrier    id of the change that carries most of the divergence there; empty where no confirmed change carries it
    share      share of the divergence of answers that is gone without the carrier; the control is the most that random
               directions of equal energy take away
    """

    asked: str
    carrier: str
    share: Measure


@dataclass(frozen=True)
class Finding:
    """Changes and sorts of questions that show the same.

    words      words that tell tuned's answers there from all other text, most telling first; to be treated as hostile
    less       whether these are words that tuned says less, as nothing is known that it says more
    members    ids of confirmed changes, best tested first; empty where the models differ and no confirmed change says why
    when       sorts of questions on which it shows, largest divergence first
    """

    words: list[str]
    less: bool = False
    members: list[str] = field(default_factory=list)
    when: list[When] = field(default_factory=list)
