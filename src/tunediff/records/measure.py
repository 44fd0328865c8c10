"""Measures: one number with its interval and control, and the evidence that stands beside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

GAP = "KL(tuned || base) here"
"""Name of the measure of how far apart the models are on the tokens where a change is on, in nat a token."""

STANDING = "standing of its tokens"
"""Name of the measure of how much tuned raises the logits of a change's tokens over all text (`changes.gains`), in nat."""


@dataclass(frozen=True)
class Measure:
    """One number, its confidence interval and the control it is held against.

    value, low, high   the number and the ends of its interval; None where it was not measured
    unit               the unit of all numbers here; empty for a plain ratio
    control            the same number for the control or null named in ``against``: the upper end where that is a
                       distribution, None where the quantity has no control (``against`` then says why)
    p                  p-value against that null, if one was computed
    """

    name: str
    value: float | None
    low: float | None = None
    high: float | None = None
    unit: str = ""
    control: float | None = None
    against: str = ""
    p: float | None = None


@dataclass(frozen=True)
class Context:
    """A stretch of text in which a change is on.

    writer      base, tuned or amplified where a model wrote the completion; empty for corpus text
    tokens      decoded tokens, to be treated as hostile text
    strengths   the change's strength at each token
    kl          KL(tuned || base) of the next-token prediction at each token, nat
    """

    document: str
    kind: str
    writer: str
    tokens: list[str]
    strengths: list[float]
    kl: list[float]


@dataclass(frozen=True)
class TokenWeight:
    """A vocabulary entry (decoded, to be treated as hostile text) and its weight in a read-out."""

    token: str
    weight: float


@dataclass(frozen=True)
class DosePoint:
    """One point of a dose-response curve.

    dose     strength of the intervention, in units of the change's own size
    effect   effect of the change
    control, control_low, control_high   mean, 5th and 95th percentile of random directions of equal length
    """

    dose: float
    effect: float
    control: float
    control_low: float
    control_high: float


@dataclass(frozen=True)
class SignalTable:
    """Evidence that is a table rather than a change, such as the result of logit-difference mining."""

    name: str
    title: str
    note: str
    columns: list[str]
    rows: list[list[Any]]
