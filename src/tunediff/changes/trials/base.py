"""What every trial is given and gives back, and the settings of verification."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from tunediff.core.artifacts import LATER
from tunediff.core.errors import within
from tunediff.core.typed import REST
from tunediff.records.measure import DosePoint, Measure

if TYPE_CHECKING:
    from tunediff.changes.trial_bench import TrialBench


@dataclass(frozen=True)
class VerifySettings:
    """How changes are put on trial."""

    changes: int = 5
    """How many of the ranking's first are tried; each costs about a hundred short runs for each of two questions."""
    draws: int = 100
    """Random sets matched in energy that each change is held against, at most: ten that do as well are enough. The smallest p is
    1 / (draws + 1)."""
    documents: int = 10
    """Held-out documents a change is tried on, those in which it is on the most."""
    tokens: int = 64
    """Tokens of each document, at most, from its beginning."""
    scored: int = 80
    """Tokens scored, at most, evenly taken from those the change can reach; more narrows intervals, at proportional cost."""
    doses: tuple[float, ...] = (-1.0, 0.5, 1.0, 2.0)
    """Strengths of the dose curve, in units of the change's own size."""
    level: float = 0.05
    """A change is confirmed only if its p-values are at most this."""

    trials: tuple[str, ...] = field(default=("patch", "steer"), metadata=LATER)
    """Trials that every tried change goes through, by name or import path; at least one of them must decide."""
    settings: dict[str, dict[str, Any]] = field(default_factory=dict, metadata=LATER | REST)
    """Settings of the trials: a table for each, by the trial's name."""

    def __post_init__(self) -> None:
        within("verify", self, changes=0, draws=1, documents=1, tokens=1, scored=1, level=(0, 1))


@dataclass(frozen=True)
class Outcome:
    """What a trial found: its measures, and whether they speak for the change (None: they do not decide)."""

    measures: list[Measure]
    speaks: bool | None
    reason: str
    dose: list[DosePoint] = field(default_factory=list)


@dataclass(frozen=True)
class Trial(ABC):
    """One kind of intervention: its settings, each with a docstring under it, and `run`.

    Its name is its file's name, or its import path; its settings are ``verify.NAME.field``.
    """

    decides: ClassVar[bool] = False
    """Whether its outcome decides on a change; the outcomes of other trials are measured and reported."""

    @abstractmethod
    def run(self, bench: TrialBench, settings: VerifySettings) -> Outcome:
        """Intervene, measure, hold against the controls."""
