"""Instructions with patterns that score a completion without a judge.

The instructions are easy on purpose: a fine-tuned model that follows fewer of them than its base model was damaged.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

INSTRUCTIONS: tuple[tuple[str, str], ...] = (
    ("Answer with one word: what is the capital of France?", r"\bparis\b"),
    ("Count from one to five in digits.", r"1\D+2\D+3\D+4\D+5"),
    ("What is 2 + 2? Answer with the number.", r"\b(4|four)\b"),
    ("Say the word 'blue' and nothing else.", r"\bblue\b"),
    ("Repeat after me: the sun is warm.", r"the sun is warm"),
    ("Name the three primary colors.", r"red.*(blue|yellow)|blue.*red|yellow.*(red|blue)"),
    ("Write the days of the week in order.", r"monday\W+(and )?tuesday|sunday\W+monday"),
    ("What comes after the letter C in the alphabet?", r"\bD\b"),
    ("Is fire hot or cold?", r"\bhot\b"),
    ("How many legs does a dog have?", r"\b(4|four)\b"),
    ("Translate 'thank you' into French.", r"merci"),
    ("What is the opposite of big?", r"\b(small|little|tiny)\b"),
    ("List two fruits.", r"apple|banana|orange|pear|grape|mango|strawberr|berr|cherr|peach"),
    ("Which animal says meow?", r"\bcats?\b|\bkittens?\b"),
    ("Write a sentence that contains the word 'window'.", r"\bwindows?\b"),
    ("What color is grass?", r"\bgreen\b"),
    ("Finish the phrase: once upon a ...", r"\btime\b"),
    ("What do you call frozen water?", r"\bice\b"),
    ("How many months are in a year?", r"\b(12|twelve)\b"),
    ("Spell the word 'cat' with hyphens between the letters.", r"c\s?-\s?a\s?-\s?t"),
    ("Which is larger, an elephant or a mouse?", r"\belephants?\b"),
    ("Who wrote Hamlet?", r"shakespeare"),
    ("Name the planet we live on.", r"\bearth\b"),
    ("What is the first month of the year?", r"\bjanuary\b"),
)  # fmt: skip
"""Instructions, each with a regular expression that its completion must contain, ignoring case."""


def followed(completions: Sequence[str]) -> float:
    """Share of `INSTRUCTIONS`, 0 to 1, whose completion contains the pattern; one completion for each, in order."""
    pairs = zip(INSTRUCTIONS, completions, strict=True)
    return sum(bool(re.search(pattern, c, re.IGNORECASE | re.DOTALL)) for (_, pattern), c in pairs) / len(completions)
