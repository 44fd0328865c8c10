"""Planted benchmarks: activations with a known difference, and how much of the difference a dictionary finds.

There is no language model. Sparse features along known directions are active at some tokens, and are written with a
known gain into the base and the tuned activations. The common case follows the toy settings under which crosscoders are
usually compared. Every other case changes one property that also varies between real fine-tuned models.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from tunediff.core.axes import BASE, TUNED
from tunediff.core.chance import generator
from tunediff.core.errors import SettingError
from tunediff.dictionaries.architectures.base import Spec
from tunediff.dictionaries.fitted import Fitted
from tunediff.dictionaries.fitting import fit
from tunediff.dictionaries.latent_scaling import LatentScale, latent_scaling
from tunediff.dictionaries.schedule import FitSettings
from tunediff.dictionaries.sources import TensorSource

Kind = Literal["shared", "base", "tuned", "amplified", "rotated", "moved"]

SPECIFIC = 0.9
"""Smallest share of decoder norm in the tuned model that means tuned only; at most 1 - `SPECIFIC` means base only."""

HALF = 0.6
"""Largest share of decoder norm in the tuned model that means shared; the smallest is 1 - `HALF`."""

COSINE = 0.9
"""Cosine above which a latent's decoder vector matches a planted direction."""


@dataclass(frozen=True)
class Truth:
    """One planted feature.

    kind              how the tuned model differs from the base model in this feature
    base_D, tuned_D   vector that one unit of the feature writes into each model; zeros where a model lacks the feature
    rate              share of tokens at which the feature is active, 0 to 1
    """

    kind: Kind
    base_D: Tensor
    tuned_D: Tensor
    rate: float


@dataclass(frozen=True)
class Case:
    """How activations are planted; the defaults make the common case."""

    name: str
    """Name of the case; part of the random stream's name."""

    width: int = 24
    """Width D of the activations."""

    shared: int = 16
    """Number of features that are the same in both models."""

    base_only: int = 4
    """Number of features that only the base model has."""

    tuned_only: int = 4
    """Number of features that only the tuned model has."""

    amplified: int = 0
    """Number of features that the tuned model writes `gain` times as strongly."""

    rotated: int = 0
    """Number of features whose direction in the tuned model is rotated by `degrees`."""

    moved: int = 0
    """Number of features with the same direction in both models, but active at unrelated tokens."""

    rate: float = 0.08
    """Share of tokens at which a feature is active, 0 to 1."""

    specific_rate: float = 0.08
    """Share of tokens at which a base-only or tuned-only feature is active, 0 to 1."""

    gain: float = 1.5
    """Factor on amplified features in the tuned model."""

    degrees: float = 45.0
    """Angle between a rotated feature's directions in the two models, in degrees."""

    shift: float = 0.0
    """Length of a constant vector added to the tuned activations at every token."""

    correlation: float = 0.0
    """Chance that a tuned-only feature copies a shared feature's activity: 0 is independent, 1 always together."""

    tuned_scale: float = 1.0
    """Factor on all features of the tuned model: a mismatch of scale between the models."""

    noise: float = 0.01
    """Standard deviation of the Gaussian noise in each element, independent between the models."""

    samples: int = 8192
    """Number of training tokens."""

    held_out: int = 32768
    """Number of held-out tokens; enough that a feature with rate 0.005 is active over 100 times."""

    latents: int = 48
    """Number of latents of a dictionary under the reference settings."""

    k: float = 3.0
    """Number of active latents a token under the reference settings."""

    settings: FitSettings = field(
        default_factory=lambda: FitSettings(steps=1500, batch=512, learning_rate=3e-3, log_every=500)
    )
    """Reference training settings."""


_NARROW = Case(
    "narrow",
    base_only=0,
    specific_rate=0.005,
    samples=16_384,
    held_out=65_536,
    latents=64,
    settings=FitSettings(steps=2000, batch=256, learning_rate=3e-3, log_every=500),
)

CASES: dict[str, Case] = {
    case.name: case
    for case in (
        Case("common"),
        _NARROW,
        dataclasses.replace(_NARROW, name="narrow-matched", k=1.3),
        Case("amplified", base_only=0, tuned_only=0, amplified=4),
        Case("rotated", base_only=0, tuned_only=0, rotated=4),
        Case("moved", base_only=0, tuned_only=0, moved=4),
        Case("removed", base_only=4, tuned_only=0),
        Case("shift", base_only=0, shift=2.0),
        Case("correlated", base_only=0, correlation=0.5),
        Case("scale", tuned_scale=1.3),
        Case("null", base_only=0, tuned_only=0),
    )
}
"""Every case by name.

narrow-matched is the narrow case with k near the true L0. null has two equal models that differ in noise alone.
"""


@dataclass(frozen=True, eq=False)
class Planted:
    """Planted activations with their case and true features."""

    case: Case
    source: TensorSource
    truth: tuple[Truth, ...]


def plant(case: Case | str, seed: int) -> Planted:
    """Plant activations (N, 2, D) of `case`; the same seed gives the same bytes.

    Raises `SettingError` for an unknown name.
    """
    if isinstance(case, str):
        if case not in CASES:
            raise SettingError(f"there is no planted case {case!r}", expected=", ".join(CASES))
        case = CASES[case]
    rng = generator(seed, "planted", case.name)
    counts: dict[Kind, int] = {
        "shared": case.shared,
        "base": case.base_only,
        "tuned": case.tuned_only,
        "amplified": case.amplified,
        "rotated": case.rotated,
        "moved": case.moved,
    }
    kinds = [kind for kind, count in counts.items() for _ in range(count)]
    K, D = len(kinds), case.width
    unit_KD = torch.nn.functional.normalize(torch.randn(K, D, generator=rng), dim=1)
    other_KD = torch.randn(K, D, generator=rng)
    other_KD = torch.nn.functional.normalize(other_KD - (other_KD * unit_KD).sum(1, keepdim=True) * unit_KD, dim=1)
    angle = math.radians(case.degrees)
    shift_D = torch.nn.functional.normalize(torch.randn(D, generator=rng), dim=0) * case.shift
    truth = []
    for kind, unit, other in zip(kinds, unit_KD, other_KD):
        base = torch.zeros(D) if kind == "tuned" else unit
        tuned = {
            "base": torch.zeros(D),
            "amplified": case.gain * unit,
            "rotated": math.cos(angle) * unit + math.sin(angle) * other,
        }.get(kind, unit)
        rate = case.specific_rate if kind in ("base", "tuned") else case.rate
        truth.append(Truth(kind, base, tuned * case.tuned_scale, rate))

    def draw(samples: int) -> Tensor:
        rate_K = torch.tensor([t.rate for t in truth])
        on_NK = torch.rand(samples, K, generator=rng) < rate_K
        again_NK = torch.rand(samples, K, generator=rng) < rate_K
        copy_NK = torch.rand(samples, K, generator=rng) < case.correlation
        size_NK = torch.rand(samples, K, generator=rng) + 0.5
        partner = 0
        for i, kind in enumerate(kinds):
            if kind == "tuned" and case.shared:
                on_NK[:, i] = torch.where(copy_NK[:, i], on_NK[:, partner % case.shared], on_NK[:, i])
                partner += 1
        moved_K = torch.tensor([kind == "moved" for kind in kinds])
        base_NK, tuned_NK = on_NK * size_NK, torch.where(moved_K, again_NK, on_NK) * size_NK
        x = torch.stack(
            [
                base_NK @ torch.stack([t.base_D for t in truth]),
                tuned_NK @ torch.stack([t.tuned_D for t in truth]) + shift_D,
            ],
            dim=1,
        )
        return x + case.noise * torch.randn(x.shape, generator=rng)

    return Planted(case, TensorSource(draw(case.samples), draw(case.held_out)), tuple(truth))


@dataclass(frozen=True)
class Score:
    """How much of the planted features a dictionary found. The first four fields count features by kind.

    planted            all planted features
    learned            features with a live latent of cosine over `COSINE` in every model that has the feature
    by_norm            learned features whose best latent is in the right norm bin
    by_scaling         learned features whose best latent gets the right verdict from Latent Scaling
    false_by_norm      live latents in a model-specific norm bin that match no planted feature of that model
    false_by_scaling   live latents with a model-specific verdict that match no planted feature of that model
    ev_delta           explained variance of the difference
    """

    planted: dict[str, int]
    learned: dict[str, int]
    by_norm: dict[str, int]
    by_scaling: dict[str, int]
    false_by_norm: int
    false_by_scaling: int
    ev_delta: float


def bin_of(share: float) -> str:
    """Norm bin ("base", "shared", "tuned" or "between") of the tuned model's share of decoder norm, 0 to 1."""
    if share >= SPECIFIC:
        return "tuned"
    if share <= 1 - SPECIFIC:
        return "base"
    return "shared" if 1 - HALF <= share <= HALF else "between"


_BIN: dict[str, Callable[[str], bool]] = {
    "shared": lambda b: b == "shared",
    "base": lambda b: b == "base",
    "tuned": lambda b: b == "tuned",
    # A gain of 1.5 is a share of 0.6, at the edge of the shared bin: any bin that is not model-specific is right.
    "amplified": lambda b: b in ("shared", "between"),
    "rotated": lambda b: b in ("shared", "between"),
    # A dictionary sees one direction active at unrelated tokens as two features, one for each model.
    "moved": lambda b: b in ("base", "tuned"),
}
_VERDICT = {"base": "base-specific", "tuned": "tuned-specific"}


def score(planted: Planted, fitted: Fitted, scales: list[LatentScale] | None = None) -> Score:
    """Match latents to planted features, and count what was learned and what was judged right.

    scales   Latent Scaling of every latent; computed on held-out tokens by default

    A dictionary of the difference is matched to what each feature adds to the difference, so it cannot learn a shared
    feature.
    """
    scales = latent_scaling(fitted, planted.source) if scales is None else scales
    dictionary = fitted.dictionary
    write_MFD = torch.nn.functional.normalize(dictionary.write_FSMD().detach()[:, 0].transpose(0, 1), dim=2)
    spec: Spec = dictionary.spec
    of_difference = spec.target == "difference"
    share_F = dictionary.share_F()
    live_F = fitted.firings_F > 0
    kinds = [t.kind for t in planted.truth]
    names = sorted(set(kinds))
    table: dict[str, dict[str, int]] = {
        name: dict.fromkeys(map(str, names), 0) for name in ("learned", "by_norm", "by_scaling")
    }
    matched_FK = torch.zeros(len(share_F), len(kinds), dtype=torch.bool)
    for i, truth in enumerate(planted.truth):
        either = truth.kind == "moved"
        vectors = [(BASE, truth.base_D), (TUNED, truth.tuned_D)]
        if of_difference:
            moved = [(TUNED, -truth.base_D), (TUNED, truth.tuned_D)]
            vectors = moved if either else [(TUNED, truth.tuned_D - truth.base_D)]
        cosines = [write_MFD[m] @ torch.nn.functional.normalize(v, dim=0) for m, v in vectors if float(v.norm()) > 0]
        if not cosines:
            continue
        cosine_F = torch.stack(cosines).amax(0) if either else torch.stack(cosines).amin(0)
        cosine_F = torch.where(live_F, cosine_F, torch.full_like(cosine_F, -1.0))
        matched_FK[:, i] = cosine_F > COSINE
        best = int(cosine_F.argmax())
        if float(cosine_F[best]) <= COSINE:
            continue
        table["learned"][truth.kind] += 1
        table["by_norm"][truth.kind] += _BIN[truth.kind](bin_of(float(share_F[best])))
        verdict = scales[best].kind
        right = verdict in _VERDICT.values() if either else verdict == _VERDICT.get(truth.kind, "not specific")
        table["by_scaling"][truth.kind] += right
    right_F = {
        side: matched_FK[:, [i for i, kind in enumerate(kinds) if kind in (side, "moved")]].any(1)
        for side in ("base", "tuned")
    }
    false = {"norm": 0, "scaling": 0}
    for j in live_F.nonzero().flatten().tolist():
        for side in ("base", "tuned"):
            false["norm"] += bin_of(float(share_F[j])) == side and not bool(right_F[side][j])
            false["scaling"] += scales[j].kind == _VERDICT[side] and not bool(right_F[side][j])
    return Score(
        planted={name: kinds.count(name) for name in names},
        **table,
        false_by_norm=false["norm"],
        false_by_scaling=false["scaling"],
        ev_delta=fitted.quality.ev_delta,
    )


def run(case: Case | str, spec: Spec, seed: int, settings: FitSettings | None = None) -> Score:
    """Plant a case, fit a dictionary and score it; `settings` replaces the case's reference settings."""
    planted = plant(case, seed)
    settings = dataclasses.replace(settings or planted.case.settings, seed=seed)
    return score(planted, fit(spec, planted.source, settings))
