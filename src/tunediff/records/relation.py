"""Relations: how a tuned model's weights and configuration relate to those of its base, in numbers and in a word."""

from __future__ import annotations

from dataclasses import dataclass, field

KINDS = {
    "same weights": "tuned has base's weights",
    "rounded copy": "tuned has base's weights, rounded to fewer bits",
    "adapter": "tuned is an adapter over base",
    "merged adapter": "tuned differs from base by matrices of low rank, as a merged adapter does",
    "light tune": "tuned is a light fine-tune of base",
    "heavy tune": "tuned is a heavy fine-tune of base",
    "other ancestor": "tuned has base's shapes, but its weights do not come from base",
    "unrelated": "tuned is built differently from base",
}
"""The kinds of relation, and each in words."""
FOREIGN = ("other ancestor", "unrelated")
"""Kinds of a tuned model that was not made from base."""


@dataclass(frozen=True)
class ConfigDifference:
    """A field of the configuration in which the models differ, as a dotted path, and both values as JSON."""

    field: str
    base: str
    tuned: str


@dataclass(frozen=True)
class Relation:
    """How tuned's weights and configuration relate to base's.

    kind        one of `KINDS`
    equal       share (0..1) of the compared numbers that are equal to the bit
    distance    norm of the difference of all compared weights, relative to the norm of base's
    cosine      median over weight matrices of the cosine between base's and tuned's, -1..1; None where there are none
    rank        largest rank that explains 99 % of the squared difference of each examined matrix; None if none was examined
    examined    number of differing matrices whose ranks were examined, of `changed`
    changed     number of weight matrices that differ
    compared    number of parameters compared; embeddings are compared on the rows that both have
    only_base, only_tuned   parameters that only one model has, or that have another shape in the other
    config      fields of the configuration that differ, if they can change what the network computes
    notes       what else was noticed, in sentences
    """

    kind: str
    equal: float
    distance: float
    cosine: float | None
    rank: int | None
    examined: int
    changed: int
    compared: int
    only_base: int = 0
    only_tuned: int = 0
    config: list[ConfigDifference] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def is_foreign(self) -> bool:
        """Whether tuned was not made from base, as far as weights tell."""
        return self.kind in FOREIGN
