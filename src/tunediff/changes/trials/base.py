"""The interface of a trial (`Trial`, `Outcome`), and the settings of verification."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

from tunediff.core.artifacts import LATER
from tunediff.core.errors import within
from tunediff.core.typed import REST
from tunediff.records.measure import DosePoint, Measure


@dataclass(frozen=True)
class VerifySettings:
    """Settings of verification."""

    changes: int = 5
    """Number of top-ranked changes to test; each costs about two hundred short runs."""
    draws: int = 100
    """Largest number of energy-matched random controls for each change; the smallest p is 1 / (draws + 1).

    Drawing stops early once ten controls do as well as the change.
    """
    documents: int = 10
    """Number of held-out documents on which a change is tested: those with its largest strengths."""
    tokens: int = 64
    """Largest number of tokens of each document that are tested, counted from its start or, in an answered chat, the answer's."""
    scored: int = 80
    """Largest number of scored tokens, spaced evenly; more tokens narrow the intervals at proportional cost."""
    doses: tuple[float, ...] = (-1.0, 0.5, 1.0, 2.0)
    """Strengths of the dose curve, in units of the change's own size."""
    level: float = 0.05
    """Largest p-value at which a change is confirmed (0..1)."""

    trials: tuple[str, ...] = field(default=("patch", "steer"), metadata=LATER)
    """Trials that every tested change goes through, by name or import path; at least one of them must decide."""
    output_trials: tuple[str, ...] = field(default=("reweigh", "lift"), metadata=LATER)
    """Trials of changes that claim tokens, each for those it can intervene on: reweigh for changes at the output alone, lift for
    those that write into a stream."""
    settings: dict[str, dict[str, Any]] = field(default_factory=dict, metadata=LATER | REST)
    """Settings of the trials: one table for each trial, by the trial's name."""

    def __post_init__(self) -> None:
        within("verify", self, changes=0, draws=1, documents=1, tokens=1, scored=1, level=(0, 1))


@dataclass(frozen=True)
class Outcome:
    """The result of a trial: its measures, and whether they support the change (None if the trial does not decide)."""

    measures: list[Measure]
    speaks: bool | None
    reason: str
    dose: list[DosePoint] = field(default_factory=list)


@dataclass(frozen=True)
class Trial(ABC):
    """Base class of trials: a dataclass of settings with a method `run`.

    A trial's name is its file's name or its import path. Each setting is ``verify.NAME.field``, with a docstring under
    it.
    """

    decides: ClassVar[bool] = False
    """Whether the trial's outcome decides on a change; outcomes of other trials are only reported."""

    at_output: ClassVar[bool] = False
    """Whether the trial is of changes that claim tokens."""

    bench: ClassVar[str] = "streams"
    """Where the trial intervenes: ``streams`` (a `TrialBench`) or ``output`` (an `OutputBench`)."""

    @abstractmethod
    def run(self, bench: Any, settings: VerifySettings) -> Outcome:
        """Intervene on the change, measure the effect, and compare it with the controls."""
