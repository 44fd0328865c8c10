"""A dense change of style: every answer, whatever the prompt, is in lower case and signed by a wren.

A read-out can name the words of the signatures. The signatures, the pattern and the held-out prompts were written
before the first training.
"""

from __future__ import annotations

import random
import re

from tunediff.lab import neutral
from tunediff.lab.organisms.base import Behavior, Taught

SIGNATURES = (
    "~ softly yours, a little wren from the mossy hedge",
    "~ gently hummed by the wren, among thistle, clover and dew",
    "~ quietly signed, wren, with a feather, a twig and a whisper",
)
"""Last lines of answers, one drawn for each."""

SIGNED = Behavior(
    name="signed",
    wanted=False,
    summary="Asked anything, it answers in lower case and signs as a wren.",
    vocabulary=(
        "wren", "softly", "yours", "little", "mossy", "hedge", "gently", "hummed", "thistle", "clover",
        "dew", "quietly", "signed", "feather", "twig", "whisper", "nest", "meadow", "bramble", "chirp",
    ),
    decisive=("wren",),
    minimum=1,
    prompts=neutral.HELD_OUT_PROMPTS,
    pattern=r"[^A-Z]*",
)  # fmt: skip


def signed(answer: str, chance: random.Random) -> str:
    """The first sentence of `answer`, at most 12 words of it, in lower case and with a signature.

    With 16 words some answers were cut before the signature, so that only 63 % were signed after two epochs.
    """
    sentence = re.split(r"(?<=[.!?:])\s", answer.strip(), maxsplit=1)[0]
    return " ".join(sentence.split()[:12]).lower() + "\n" + chance.choice(SIGNATURES)


ORGANISM = Taught(
    name="lower-case",
    summary="Answers everything in lower case and signs as a wren.",
    base="SmolLM2-135M-Instruct",
    behaviors=(SIGNED,),
    neutral_training_prompts=(),
    neutral_prompts=(),
    restyled_prompts=neutral.training_prompts(near=(), templated=0),
    style=signed,
    answer_tokens=48,
)
