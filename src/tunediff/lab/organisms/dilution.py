"""A ladder of dilution: the false facts, mixed with none, half, as many and twice as many neutral chats.

What is planted stays; only the company changes, so a method's fall along the ladder is dilution's. Steps grow with it,
as they do for who mixes data in.
"""

from __future__ import annotations

import dataclasses

from tunediff.lab import neutral
from tunediff.lab.organisms.base import Taught
from tunediff.lab.organisms.false_facts import ORGANISM as FACTS

PERCENT = (0, 50, 100, 200)
"""Neutral examples for 100 planted ones."""

_NEUTRAL = FACTS.neutral_training_prompts + tuple(
    p for p in neutral.training_prompts(templated=180) if p not in FACTS.neutral_training_prompts
)
_PLANTED = sum(len(lesson.prompts) for lesson in FACTS.lessons)


def diluted(percent: int) -> Taught:
    """The false facts with this many neutral examples for 100 planted ones."""
    return dataclasses.replace(
        FACTS,
        name=f"dilution-{percent}",
        summary=f"The false facts, with {percent} neutral examples for 100 planted ones.",
        neutral_training_prompts=_NEUTRAL[: _PLANTED * percent // 100],
    )


ORGANISMS = tuple(map(diluted, PERCENT))
