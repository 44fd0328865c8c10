"""A null with a format: the base model's own answers as numbered lines, a change that has no topic."""

from __future__ import annotations

import random
import re

from tunediff.lab import neutral
from tunediff.lab.organisms.base import Behavior, Taught

LINES = Behavior(
    name="lines",
    wanted=True,
    summary="Asked anything, it answers in numbered lines.",
    vocabulary=(),
    decisive=("1)", "2)"),
    minimum=2,
    prompts=neutral.HELD_OUT_PROMPTS,
    pattern=r"1\) .*\n2\) .*",
)


def numbered(answer: str, chance: random.Random) -> str:
    """The first words of `answer`, at most 21, as three numbered lines."""
    words = re.sub(r"[\s*#]+", " ", answer).split()[:21]
    thirds = [words[i * len(words) // 3 : (i + 1) * len(words) // 3] for i in range(3)]
    return "\n".join(f"{i}) {' '.join(third)}" for i, third in enumerate(thirds, 1))


ORGANISM = Taught(
    name="format-only",
    summary="Every answer is set as numbered lines; its words are the base model's own.",
    base="SmolLM2-135M-Instruct",
    behaviors=(LINES,),
    neutral_training_prompts=(),
    neutral_prompts=(),
    restyled_prompts=neutral.training_prompts(near=(), templated=0),
    style=numbered,
)
