"""Dilution: the false facts, trained together with 0, 50, 100 or 200 neutral chats for every 100 planted examples.

The planted examples stay the same, so any loss of a method's power from 0 to 200 is due to dilution. More neutral chats
also mean more training steps, as in practice.
"""

from __future__ import annotations

import dataclasses

from tunediff.lab import neutral
from tunediff.lab.organisms.base import Taught
from tunediff.lab.organisms.false_facts import ORGANISM as FACTS

PERCENT = (0, 50, 100, 200)
"""Numbers of neutral examples for every 100 planted examples; one organism for each number."""

_NEUTRAL = FACTS.neutral_training_prompts + tuple(
    p for p in neutral.training_prompts(templated=180) if p not in FACTS.neutral_training_prompts
)
_PLANTED = sum(len(lesson.prompts) for lesson in FACTS.lessons)


def diluted(percent: int) -> Taught:
    """The false facts with `percent` neutral examples for every 100 planted examples."""
    return dataclasses.replace(
        FACTS,
        name=f"dilution-{percent}",
        summary=f"The false facts, with {percent} neutral examples for 100 planted ones.",
        neutral_training_prompts=_NEUTRAL[: _PLANTED * percent // 100],
    )


ORGANISMS = tuple(map(diluted, PERCENT))
