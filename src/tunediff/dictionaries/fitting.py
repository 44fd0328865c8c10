"""Fitting a dictionary to a pair's activations: normalization, training, calibration, held-out quality,
resumption."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from tunediff import dictionaries, kernels
from tunediff.core import artifacts, variants
from tunediff.core.axes import BASE, TUNED, check
from tunediff.core.chance import generator
from tunediff.core.errors import ArtifactError, NumericsError, SettingError
from tunediff.dictionaries.architectures.base import MODELS, Dictionary, Spec, Target, delta_of, require, select
from tunediff.kernels import gates
from tunediff.kernels.kept import Pairs
from tunediff.records.change import Change
from tunediff.records.site import Site

SCHEMA = "tunediff.dictionary/1"
TRAIN, HELD_OUT = "train", "held_out"
CHUNK = 4096
"""Tokens at a time wherever a pass without gradients streams a source; speed only."""
LIMIT = 1 << 20
"""Training tokens, spread evenly, that moments are measured on where there are more."""
BASE_TOKENS, BASE_STEPS = 1 << 18, 40
"""Training tokens, spread evenly, and steps of conjugate gradients that `base_writes` takes at most."""
START = 1 << 14
"""Training tokens that a dictionary's start may be drawn from, at most."""
RECONSTRUCTED: dict[Target, tuple[str, ...]] = {
    "both": ("base", "tuned", "delta"),
    "tuned": ("base", "tuned", "delta"),
    "difference": ("delta",),
}
"""Of what a dictionary has an explained variance, by its target; see `Quality`."""

PRECISIONS = ("float32", "bfloat16")
"""What the products of a step may be made in."""

Progress = Callable[[int, int, dict[str, float]], None]
"""Called with tokens done, tokens in all, and the newest row of the training curve."""


class Source(Protocol):
    """Where activations come from: a harvest on disk, or tensors in memory.

    One that knows documents also has ``documents(split)``, the document number of each token; calibration then
    keeps whole documents apart. One that cannot read everywhere at once also has ``order(split, index_N, generator)``, a random
    order of the tokens at `index_N` in which it can read them.
    """

    @property
    def fingerprint(self) -> str:
        """Changes whenever the activations would."""

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites along axis S, in order."""

    def count(self, split: str) -> int:
        """Tokens in ``train`` or ``held_out``."""

    def read(self, split: str, index_N: Tensor) -> Tensor:
        """The activations x_NSMD of these tokens (int64 indices in [0, count)), float32, in this order."""


class TensorSource:
    """Activations in memory. `x_train`, `x_held_out`: (N, S, 2, D), or (N, 2, D) for one site."""

    def __init__(self, x_train: Tensor, x_held_out: Tensor, sites: tuple[Site, ...] | None = None):
        self._splits = {}
        for split, x in ((TRAIN, x_train), (HELD_OUT, x_held_out)):
            x = x.unsqueeze(1) if x.ndim == 3 else x
            self._splits[split] = check(x.float().contiguous(), "NSMD", M=MODELS)
        self._sites = sites or tuple(Site(s) for s in range(self._splits[TRAIN].shape[1]))
        check(self._splits[TRAIN], "NSMD", S=len(self._sites))

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites along axis S."""
        return self._sites

    @cached_property
    def fingerprint(self) -> str:
        """A hash of both splits' bytes."""
        import hashlib

        digest = hashlib.sha256()
        for x in self._splits.values():
            digest.update(str(tuple(x.shape)).encode())
            digest.update(x.numpy().data.cast("B"))
        return digest.hexdigest()[:16]

    def count(self, split: str) -> int:
        """Tokens in `split`."""
        return self._splits[split].shape[0]

    def read(self, split: str, index_N: Tensor) -> Tensor:
        """x_NSMD of these tokens."""
        return self._splits[split][index_N]


class _On:
    """A source whose activations arrive on a device; the copy does not make the host wait."""

    def __init__(self, source: Source, device: torch.device):
        self._source, self._device = source, device
        self.fingerprint, self.sites, self.count = source.fingerprint, source.sites, source.count

    def order(self, index_N: Tensor, rng: torch.Generator) -> Tensor:
        """A random order of training tokens, as places in `index_N`."""
        if hasattr(self._source, "order"):
            return self._source.order(TRAIN, index_N, rng)
        return torch.randperm(len(index_N), generator=rng)

    def read(self, split: str, index_N: Tensor) -> Tensor:
        x_NSMD = self._source.read(split, index_N)
        if self._device.type == "cuda" and not x_NSMD.is_cuda:
            x_NSMD = x_NSMD.pin_memory()
        return x_NSMD.to(self._device, non_blocking=True)


@dataclass(frozen=True, eq=False)
class Normalization:
    """Centering and scaling of streams: x_normalized = (x - center_SMD) / scale_S.

    center_SMD        each model's own mean: a constant offset is out before a dictionary sees it
    scale_S           one root mean square for both models (two would break the difference)
    log_rms_ratio_S   log(rms tuned / rms base) of the centered streams, itself a finding
    delta_variance    mean square of the normalized, centered difference tuned - base; 0 if there is none
    """

    center_SMD: Tensor
    scale_S: Tensor
    log_rms_ratio_S: Tensor
    delta_variance: float

    @classmethod
    def measure(cls, source: Source, *, limit: int = LIMIT) -> Normalization:
        """Read it off the training tokens: all of them, or `limit` spread evenly; sums in float64.

        Raises `NumericsError` on non-finite activations or a site that never varies.
        """
        index_N = _spread(source.count(TRAIN), limit)
        sums = squares = deltas = 0
        pivot = None
        for at in index_N.split(CHUNK):
            x = source.read(TRAIN, at).double()
            if not bool(torch.isfinite(x).all()):
                raise NumericsError(
                    "the training activations are not finite", remedy="look for overflow in the forward pass"
                )
            pivot = x.mean(0) if pivot is None else pivot
            x = x - pivot  # close to the mean, so that the difference of sums below loses nothing
            sums, squares = sums + x.sum(0), squares + x.square().sum(0)
            deltas = deltas + delta_of(x).square().sum(0)
        if pivot is None:
            raise NumericsError("there are no training tokens", remedy="harvest more text")
        n = len(index_N)
        mean_SMD = sums / n
        variance_SMD = (squares / n - mean_SMD.square()).clamp_min(0)
        rms_SM = variance_SMD.mean(2).sqrt()
        scale_S = variance_SMD.mean((1, 2)).sqrt()
        if not bool((scale_S > 0).all()):
            raise NumericsError("a site's activations never vary", got=f"scale {scale_S.tolist()}")
        delta_SD = (deltas / n - delta_of(mean_SMD[None])[0].square()).clamp_min(0)
        return cls(
            center_SMD=(pivot + mean_SMD).float(),
            scale_S=scale_S.float(),
            log_rms_ratio_S=(rms_SM[:, TUNED] / rms_SM[:, BASE]).log().float(),
            delta_variance=float((delta_SD / scale_S[:, None].square()).mean()),
        )

    def apply(self, x_NSMD: Tensor) -> Tensor:
        """Raw to normalized."""
        return (x_NSMD - self.center_SMD) / self.scale_S[:, None, None]

    def to(self, device: torch.device | str) -> Normalization:
        """The same, on `device`."""
        parts = {name: getattr(self, name).to(device) for name in ("center_SMD", "scale_S", "log_rms_ratio_S")}
        return dataclasses.replace(self, **parts)

    def undo(self, x_NSMD: Tensor) -> Tensor:
        """Normalized to raw."""
        return x_NSMD * self.scale_S[:, None, None] + self.center_SMD


@dataclass(frozen=True)
class FitSettings:
    """How a dictionary is trained. Same settings, spec and source give the same bytes on the same CPU."""

    steps: int | None = 600
    """Optimizer steps; None derives them from `epochs`. Too few: dead and half-learned latents. Too many:
    only time."""

    epochs: float = 4.0
    """Passes over the training tokens when `steps` is None."""

    batch: int = 512
    """Tokens a step. Too few: noisy gates and rare latents forgotten. Too many: few steps for the same
    text."""

    learning_rate: float | None = None
    """Peak Adam step size; None takes 1e-3 below 10,000 latents, else 1e-4. Too small: unfinished. Too
    large: dead latents."""

    warmup: float = 0.05
    """Share of the steps (1,000 at most) over which the rate grows from 0."""

    decay: float = 0.2
    """Share of the steps, at the end, over which the rate falls to 0. Too short: noisy final vectors."""

    clip: float = 1.0
    """Largest global gradient norm. Too small: slow. Too large: one odd batch moves everything."""

    anneal_from: float = 1.0
    """Every gate starts at this many times its k and comes down to it; 1 switches annealing off. Higher
    gives more latents an early gradient."""

    anneal: float = 0.1
    """Share of the steps over which k comes down."""

    aux_weight: float = 1 / 32
    """Weight of AuxK, in units of the error's variance (Gao et al. 2024). 0: dead latents stay dead."""

    aux_k: int = 512
    """Most dead latents that AuxK uses on a token; half the width and the number of dead ones bound it
    too."""

    dead_window: float = 0.02
    """A latent silent for this share of all tokens (10 million at most) counts as dead. Too short: rare
    latents are pushed about as if dead. Too long: dead ones are helped late."""

    calibration: int = 65_536
    """Most tokens on which the inference threshold is set. Too few: the mean L0 at inference misses k."""

    calibration_share: float = 0.1
    """Share of the training documents (of the tokens, where documents are not known) that the dictionary is not
    trained on, so that its threshold is set on text as new to it as any later one. 0 sets it on text trained on:
    after many epochs codes are larger there, and L0 elsewhere misses k by as much as a factor of 2. Too large:
    less to train on."""

    precision: str = field(default="float32", metadata=artifacts.LATER)
    """What a step multiplies: float32, or bfloat16, to which activations, vectors and gradients are rounded first, where compiled
    kernels serve (elsewhere float32). Sums, parameters and moments stay float32. bfloat16 takes a fifth less time; which codes are
    kept and what is explained differ as between seeds, and little of that."""

    seed: int = 0
    """Seed of the initial vectors and of the order of tokens."""

    log_every: int = 50
    """Steps between rows of the training curve."""

    checkpoint_every: int = 1000
    """Steps between checkpoints. A killed run loses at most this many."""

    def __post_init__(self) -> None:
        require(self.steps is None or self.steps >= 1, "steps is out of range", "at least 1", self.steps)
        for name in ("epochs", "clip"):
            require(getattr(self, name) > 0, f"{name} is out of range", "above 0", getattr(self, name))
        require(
            self.learning_rate is None or self.learning_rate > 0,
            "learning_rate is out of range",
            "above 0",
            self.learning_rate,
        )
        for name in ("batch", "aux_k", "calibration", "log_every", "checkpoint_every"):
            require(getattr(self, name) >= 1, f"{name} is out of range", "at least 1", getattr(self, name))
        for name in ("warmup", "decay", "anneal", "dead_window"):
            require(0 <= getattr(self, name) <= 1, f"{name} is out of range", "0 to 1", getattr(self, name))
        share = self.calibration_share
        require(0 <= share < 1, "calibration_share is out of range", "0 to below 1", share)
        require(self.anneal_from >= 1, "anneal_from is out of range", "at least 1", self.anneal_from)
        require(self.precision in PRECISIONS, "precision is unknown", " or ".join(PRECISIONS), self.precision)
        require(self.aux_weight >= 0, "aux_weight is out of range", "at least 0", self.aux_weight)


@dataclass(frozen=True)
class Quality:
    """How good a dictionary is, on held-out tokens with inference thresholds unless said otherwise; sums in
    float64.

    ev_base, ev_tuned   share of variance explained; 1 is perfect, 0 no better than the mean, below 0 worse; nan if
                        the dictionary reconstructs the difference alone. One that reads tuned alone explains base
                        by `base_writes`
    ev_delta            the same for tuned - base; low means that the dictionary missed the change
    l0_training         mean latents on a token under the training gates, on the calibration tokens
    l0_inference        mean latents on a token at inference
    l0_gap              l0_inference / l0_training - 1; beyond 0.05 either way comparisons are not valid
    dead_share          latents that were dead by the training window at the last step
    silent_share        latents that fire on no held-out token
    train_tokens, held_out_tokens   how many were used, repeats counted
    log_rms_ratio       log(rms tuned / rms base), one a site
    delta_ratio         rms of the centered difference in units of the streams' rms
    """

    ev_base: float
    ev_tuned: float
    ev_delta: float
    l0_training: float
    l0_inference: float
    l0_gap: float
    dead_share: float
    silent_share: float
    train_tokens: int
    held_out_tokens: int
    log_rms_ratio: tuple[float, ...]
    delta_ratio: float

    @property
    def comparable(self) -> bool:
        """Whether L0 at inference is within 5 % of L0 in training."""
        return abs(self.l0_gap) <= 0.05


@dataclass(frozen=True, eq=False)
class Fitted:
    """A trained dictionary, ready to read raw activations.

    dictionary      its parameters, in normalized units
    normalization   between raw and normalized
    thresholds      of each gate group, on the scaled code f*w; 0 keeps every positive code
    sites           along axis S
    quality         see `Quality`
    curve           rows of the training curve, each a dict from column to number
    firings_F       held-out tokens on which each latent fires
    seed            of the fit
    source          fingerprint of what it was fitted to
    """

    dictionary: Dictionary
    normalization: Normalization
    thresholds: dict[str, float]
    sites: tuple[Site, ...]
    quality: Quality
    curve: list[dict[str, float]]
    firings_F: Tensor
    seed: int
    source: str

    @cached_property
    def threshold_F(self) -> Tensor:
        """Each latent's threshold on its own code f: the group's threshold / w_j."""
        return thresholds_of(self.dictionary, self.thresholds)

    @torch.no_grad()
    def codes(self, x_NSMD: Tensor) -> Tensor:
        """f_NF of raw activations, at inference thresholds."""
        return gates.threshold_gate(self.dictionary.pre(self.normalization.apply(x_NSMD.float())), self.threshold_F)

    @torch.no_grad()
    def reconstruct(self, x_NSMD: Tensor) -> Tensor:
        """xhat_NSMD in raw units: sum_j f_j * write_j + offset."""
        return self.normalization.undo(self.dictionary.decode(self.codes(x_NSMD)))

    @property
    def offset_SMD(self) -> Tensor:
        """What the reconstruction holds when no latent is on, raw units: center + decoder bias * scale."""
        return self.normalization.undo(self.dictionary.bias_SMD().detach()[None])[0]

    @torch.no_grad()
    def change(self, latent: int, *, id: str, finder: str) -> Change:
        """Latent `latent` as a `Change` in raw units: its strength is the code, its write the decoder times
        scale."""
        scale = self.normalization.scale_S[:, None, None]
        own = slice(latent, latent + 1)
        rows_SMD = self.dictionary.read_FSMD(own)[0] / scale
        bias = float(self.dictionary.encoder_bias_F[latent]) - float(
            (rows_SMD.double() * self.normalization.center_SMD.double()).sum()
        )
        share = float(self.dictionary.share_F()[latent])
        group = next(g for g in self.dictionary.groups() if g.start <= latent < g.stop)
        return Change(
            id=id,
            sites=self.sites,
            rows_SMD=rows_SMD.clone(),
            write_SMD=self.dictionary.write_FSMD(own)[0] * scale,
            bias=bias,
            threshold=float(self.threshold_F[latent]),
            finder=finder,
            origin={
                "latent": latent,
                "dictionary": self.dictionary.spec.variant,
                "group": group.form_of(latent),
                "share": share,
                "held_out_firings": int(self.firings_F[latent]),
                "held_out_tokens": self.quality.held_out_tokens,
                "seed": self.seed,
            },
        )

    def save(self, folder: Path, extra: dict[str, Any] | None = None) -> None:
        """Write ``dictionary.safetensors``, ``curve.json`` and, last, the manifest."""
        norm = self.normalization
        artifacts.write_tensors(
            folder / "dictionary.safetensors",
            {
                **self.dictionary.state_dict(),
                "firings_F": self.firings_F,
                "center_SMD": norm.center_SMD,
                "scale_S": norm.scale_S,
                "log_rms_ratio_S": norm.log_rms_ratio_S,
            },
        )
        artifacts.write_json(folder / "curve.json", self.curve)
        artifacts.finish(
            folder,
            SCHEMA,
            {
                "variant": self.dictionary.spec.variant,
                "spec": self.dictionary.spec,
                "seed": self.seed,
                "sites": [str(site) for site in self.sites],
                "source": self.source,
                "thresholds": self.thresholds,
                "delta_variance": norm.delta_variance,
                "quality": self.quality,
                **(extra or {}),
            },
            ["dictionary.safetensors", "curve.json"],
        )

    @classmethod
    def load(cls, folder: Path) -> Fitted:
        """Read what `save` wrote; raises `ArtifactError` if it is unfinished, damaged or of another
        schema."""
        folder = Path(folder)
        manifest = artifacts.open_folder(folder, SCHEMA)
        tensors = artifacts.read_tensors(folder / "dictionary.safetensors")
        spec = dictionaries.spec(manifest["variant"], **manifest["spec"])
        sites = tuple(Site.parse(text) for text in manifest["sites"])
        norm = Normalization(
            center_SMD=tensors.pop("center_SMD"),
            scale_S=tensors.pop("scale_S"),
            log_rms_ratio_S=tensors.pop("log_rms_ratio_S"),
            delta_variance=manifest["delta_variance"],
        )
        firings_F = tensors.pop("firings_F")
        dictionary = build(spec, sites=len(sites), width=norm.center_SMD.shape[2], seed=manifest["seed"])
        dictionary.load_state_dict(tensors)
        quality = manifest["quality"]
        nan = float("nan")
        return cls(
            dictionary=dictionary.requires_grad_(False),
            normalization=norm,
            # JSON has no infinity: null stands for a gate that never opens.
            thresholds={k: float("inf") if v is None else v for k, v in manifest["thresholds"].items()},
            sites=sites,
            quality=Quality(
                **{
                    name: tuple(nan if v is None else v for v in value)
                    if isinstance(value, list)
                    else nan
                    if value is None
                    else value
                    for name, value in quality.items()
                }
            ),
            curve=[
                {k: nan if v is None else v for k, v in row.items()}
                for row in artifacts.read_json(folder / "curve.json")
            ],
            firings_F=firings_F,
            seed=manifest["seed"],
            source=manifest["source"],
        )


def build(spec: Spec, *, sites: int, width: int, seed: int) -> Dictionary:
    """The untrained dictionary that `spec` names."""
    return variants.load(dictionaries.PACKAGE, spec.variant)(spec, sites=sites, width=width, seed=seed)


def thresholds_of(dictionary: Dictionary, thresholds: dict[str, float]) -> Tensor:
    """Group thresholds on f*w as thresholds (F,) on f."""
    weight_F = dictionary.scales_F()
    out_F = torch.zeros_like(weight_F)
    for group in dictionary.groups():
        theta = thresholds[group.name]
        part = weight_F[group.start : group.stop]
        out_F[group.start : group.stop] = (
            torch.where(part > 0, theta / part, torch.full_like(part, float("inf"))) if theta else 0.0
        )
    return out_F


def fit(
    spec: Spec,
    source: Source,
    settings: FitSettings = FitSettings(),
    folder: Path | None = None,
    progress: Progress | None = None,
    device: torch.device | str = "cpu",
) -> Fitted:
    """Train the dictionary that `spec` names on `source`, calibrate it on what `apart` kept from training, and
    measure it on held-out tokens.

    With `folder` the result is kept there: a finished one made of the same spec, settings and source is
    opened and not trained again, a killed run resumes from its last checkpoint and ends with the same bytes,
    and anything else found there is refused with `ArtifactError`. `NumericsError`: activations or loss
    became non-finite. `device`: where it is trained; what is returned is on the CPU.
    """
    key = artifacts.key_of(
        SCHEMA,
        spec.variant,
        spec,
        dataclasses.replace(settings, checkpoint_every=1),
        source.fingerprint,
        [str(site) for site in source.sites],
    )
    if folder is not None:
        folder = Path(folder)
        if artifacts.is_finished(folder):
            _refuse_other(artifacts.open_folder(folder, SCHEMA).get("key"), key, folder)
            return Fitted.load(folder)
    device = torch.device(device)
    here = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with here, kernels.fast_matmul(device), kernels.kept_memory():
        return _fit(spec, source, settings, folder, progress, key, device)


def _refuse_other(found: str | None, key: str, folder: Path) -> None:
    if found != key:
        raise ArtifactError(
            f"{folder} holds a dictionary made of other settings or activations",
            expected=f"key {key}",
            got=f"key {found}",
            remedy="give another folder, or delete this one",
        )


def _fit(
    spec: Spec,
    source: Source,
    settings: FitSettings,
    folder: Path | None,
    progress: Progress | None,
    key: str,
    device: torch.device,
) -> Fitted:
    train_N, calibration_N = apart(source, settings)
    source = _On(source, device)
    norm = Normalization.measure(source)
    sites, width = norm.center_SMD.shape[0], norm.center_SMD.shape[2]
    dictionary = build(spec, sites=sites, width=width, seed=settings.seed)
    dictionary.delta_variance.fill_(norm.delta_variance)
    dictionary.to(device)
    some = source.order(train_N, generator(settings.seed, "start"))[:START]
    dictionary.begin(norm.apply(source.read(TRAIN, train_N[some])))
    plan = Plan.of(spec, settings, len(train_N))
    state = State.new(dictionary, plan)
    checkpoint = None if folder is None else folder / f"checkpoint-{key}.safetensors"
    if folder is not None and checkpoint is not None:
        others = [path for path in folder.glob("checkpoint-*.safetensors") if path != checkpoint]
        if others:
            _refuse_other(others[0].stem.removeprefix("checkpoint-"), key, folder)
        if checkpoint.is_file():
            state.restore(artifacts.read_tensors(checkpoint))
    order: dict[int, Tensor] = {}
    while state.step < plan.steps:
        epoch, at = divmod(state.step, plan.batches)
        if epoch not in order:
            order = {epoch: source.order(train_N, generator(settings.seed, "shuffle", epoch))}
        index_N = train_N[order[epoch][at * plan.batch : (at + 1) * plan.batch]]
        x_NSMD = norm.apply(source.read(TRAIN, index_N))
        row = step(state, x_NSMD, settings, plan)
        if row is not None:
            state.curve.append(row)
            if progress is not None:
                progress(state.step * plan.batch, plan.steps * plan.batch, row)
        if checkpoint is not None and state.step % settings.checkpoint_every == 0 and state.step < plan.steps:
            artifacts.write_tensors(checkpoint, state.tensors())
    fitted = _finish(state, source, norm, settings, plan, calibration_N)
    if folder is not None and checkpoint is not None:
        path = kernels.path(device)
        may_round = settings.precision == "bfloat16" and path == "native+bf16"
        how = {"kernels": path, "float32_products": torch.get_float32_matmul_precision(), "may_round": may_round}
        fitted.save(folder, {"key": key, "settings": settings, "steps": plan.steps, "batch": plan.batch, **how})
        checkpoint.unlink(missing_ok=True)
    return fitted


def apart(source: Source, settings: FitSettings) -> tuple[Tensor, Tensor]:
    """Places in the training split (N,), ascending: the tokens to train on, and those kept for calibration.

    Whole documents drawn by the seed, since tokens of one document tell of each other; single tokens where the
    source does not know documents or has only one. With nothing to keep apart both are all tokens.
    """
    count = source.count(TRAIN)
    unit_N = torch.arange(count)
    if hasattr(source, "documents"):
        document_N = torch.unique(source.documents(TRAIN), return_inverse=True)[1]
        unit_N = document_N if len(document_N) and int(document_N.max()) else unit_N
    units = int(unit_N.max()) + 1 if count else 0
    kept = min(math.ceil(units * settings.calibration_share), units - 1)
    if kept <= 0:
        return torch.arange(count), torch.arange(count)
    kept_U = torch.zeros(units, dtype=torch.bool)
    kept_U[torch.randperm(units, generator=generator(settings.seed, "calibration"))[:kept]] = True
    return (~kept_U[unit_N]).nonzero()[:, 0], kept_U[unit_N].nonzero()[:, 0]


def _spread(count: int, limit: int) -> Tensor:
    return torch.arange(count) if count <= limit else torch.arange(limit) * count // limit


@dataclass(frozen=True)
class Plan:
    """What follows from settings and data: `steps` of `batch` tokens, `batches` an epoch of `count`
    tokens."""

    count: int
    batch: int
    batches: int
    steps: int
    rate: float
    dead_tokens: float

    @classmethod
    def of(cls, spec: Spec, settings: FitSettings, count: int) -> Plan:
        """Derive; a source smaller than a batch gives smaller batches."""
        if count < 1:
            raise SettingError("there are no training tokens", remedy="harvest more text")
        batch = min(settings.batch, count)
        steps = settings.steps or max(1, round(count * settings.epochs / batch))
        rate = settings.learning_rate or (1e-3 if spec.latents < 10_000 else 1e-4)
        dead = min(10_000_000, settings.dead_window * steps * batch)
        return cls(count, batch, count // batch, steps, rate, max(dead, batch))

    def rate_at(self, step: int, settings: FitSettings) -> float:
        """Warm-up, plateau, linear decay to 0."""
        warm = min(1000, settings.warmup * self.steps)
        down = settings.decay * self.steps
        return self.rate * min(1.0, (step + 1) / warm if warm else 1.0, (self.steps - step) / down if down else 1.0)

    def k_factor(self, step: int, settings: FitSettings) -> float:
        """How many times its k a gate keeps at this step."""
        length = settings.anneal * self.steps
        left = max(0.0, 1 - step / length) if length else 0.0
        return 1 + (settings.anneal_from - 1) * left


@dataclass
class State:
    """Everything that training changes, and therefore everything that a checkpoint holds."""

    dictionary: Dictionary
    optimizer: kernels.Adam
    silent_F: Tensor
    step: int
    curve: list[dict[str, float]]

    @classmethod
    def new(cls, dictionary: Dictionary, plan: Plan) -> State:
        """At step 0."""
        optimizer = kernels.Adam(dictionary.parameters(), plan.rate)
        silent_F = torch.zeros_like(dictionary.encoder_bias_F, dtype=torch.long, requires_grad=False)
        return cls(dictionary, optimizer, silent_F, 0, [])

    def tensors(self) -> dict[str, Tensor]:
        """As safetensors can hold it; one file, so that it is whole or absent."""
        out = {"step": torch.tensor(self.step), "silent_F": self.silent_F}
        for name, parameter in self.dictionary.named_parameters():
            out[f"parameter.{name}"] = parameter
            for part, value in self.optimizer.state[parameter].items():
                out[f"adam.{part}.{name}"] = value
        for column in self.curve[0] if self.curve else ():
            out[f"curve.{column}"] = torch.tensor([row[column] for row in self.curve], dtype=torch.float64)
        return out

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Back to where `tensors` was taken."""
        self.step = int(tensors["step"])
        self.silent_F.copy_(tensors["silent_F"])
        columns = [name.removeprefix("curve.") for name in tensors if name.startswith("curve.")]
        lists = [tensors[f"curve.{column}"].tolist() for column in columns]
        self.curve = [dict(zip(columns, row)) for row in zip(*lists)]
        with torch.no_grad():
            for name, parameter in self.dictionary.named_parameters():
                parameter.copy_(tensors[f"parameter.{name}"])
                self.optimizer.state[parameter] = {
                    part: tensors[f"adam.{part}.{name}"].to(parameter.device, copy=True)
                    for part in ("step", "exp_avg", "exp_avg_sq")
                }


def step(state: State, x_NSMD: Tensor, settings: FitSettings, plan: Plan) -> dict[str, float] | None:
    """One optimizer step on normalized activations; a row of the training curve where one is due."""
    with kernels.rounding(settings.precision == "bfloat16"):
        return _step(state, x_NSMD, settings, plan)


def _step(state: State, x_NSMD: Tensor, settings: FitSettings, plan: Plan) -> dict[str, float] | None:
    dictionary, optimizer = state.dictionary, state.optimizer
    done = state.step / max(1, plan.steps - 1)
    k_factor = plan.k_factor(state.step, settings)
    run = dictionary(x_NSMD, progress=done, k_factor=k_factor)
    parts = dictionary.objective(run)
    optimizer.zero_grad(set_to_none=True)
    torch.stack(list(parts.values())).sum().backward()
    dead_F = state.silent_F >= plan.dead_tokens
    if settings.aux_weight:
        k = min(max(1, dictionary.width // 2), settings.aux_k)
        parts = {**parts, "aux": settings.aux_weight * dictionary.auxiliary(run, dead_F, k)}
        if parts["aux"].requires_grad:  # after the others: it adds to gradients that are there
            parts["aux"].backward()
    dictionary.hold()
    norm = kernels.norm([p.grad for p in dictionary.parameters() if p.grad is not None])
    # The fused step divides by it, which saves a pass over the gradients.
    optimizer.grad_scale = ((norm.float() + 1e-6) / settings.clip).clamp_min(1)
    rate = plan.rate_at(state.step, settings)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    with torch.no_grad():
        state.silent_F = (state.silent_F + x_NSMD.shape[0]).masked_fill(run.code.fired(), 0)
    state.step += 1
    if state.step % settings.log_every and state.step != plan.steps and state.step != 1:
        return None
    with torch.no_grad():
        error, spread = (
            run.error_NSMD.square().sum((0, 1, 3)),
            (run.x_NSMD - run.x_NSMD.mean(0)).square().sum((0, 1, 3)),
        )
        names = {"both": ("base", "tuned"), "tuned": ("tuned",), "difference": ("delta",)}
        ev = dict(zip(names[dictionary.spec.target], (1 - error / spread).tolist()))
        row = {
            "step": float(state.step),
            "rate": rate,
            "loss": float(torch.stack(list(parts.values())).sum()),
            **{f"loss.{k}": float(v) for k, v in parts.items()},
            **{f"ev_{name}": value for name, value in ev.items()},
            "l0": float(run.code.count()) / x_NSMD.shape[0],
            "dead": float((state.silent_F >= plan.dead_tokens).sum()),
        }
    if not math.isfinite(row["loss"]):
        raise NumericsError(f"the loss is not finite at step {state.step}", remedy="lower learning_rate")
    return row


@torch.no_grad()
def base_writes(
    dictionary: Dictionary, source: Source, norm: Normalization, threshold_F: Tensor
) -> tuple[Tensor, Tensor]:
    """What base has of a dictionary that reads tuned alone: a factor beta (F,) on each vector, and an offset (S, D).

    The least-squares fit of x_base by sum_j beta_j f_j d_j + offset over the training tokens, by conjugate
    gradients from beta = 1; a latent that never varies stays there, which claims no difference. At the
    optimum beta_j is Latent Scaling's factor on base's error (2504.02922), for all latents at once: fitted one by
    one, latents that change together would each claim their common change.
    """
    write_FI, bias_I = dictionary.decoder_FSMD.flatten(1), dictionary.decoder_bias_SMD.flatten()
    chunks = _spread(source.count(TRAIN), BASE_TOKENS).split(CHUNK)
    n = sum(len(at) for at in chunks)
    codes = []
    for at in chunks:
        pre_NF = dictionary.pre(norm.apply(source.read(TRAIN, at)))
        kept_P = (pre_NF > threshold_F).view(-1).nonzero()[:, 0]
        codes.append((Pairs.of(kept_P, *pre_NF.shape), pre_NF.view(-1)[kept_P]))
    f_F = sum(pairs.sum_latents(f.double()) for pairs, f in codes) / n
    square_F = sum(pairs.sum_latents(f.double().square()) for pairs, f in codes) / n
    spread_F = (square_F - f_F.square()) * write_FI.double().square().sum(1)

    def along(parts: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
        """Covariance (F,) of f_j and d_j * y over all tokens, and the mean of y (I,), from y_NI of each chunk."""
        product_F, total_I = torch.zeros_like(f_F), 0.0
        for (pairs, f), y_NI in zip(codes, parts):
            product_F += pairs.sum_latents((f * pairs.dot(y_NI, write_FI)).double())
            total_I = total_I + y_NI.double().sum(0)
        return product_F / n - f_F * (write_FI.double() @ (total_I / n)), total_I / n

    def written(scale_F: Tensor) -> Iterator[Tensor]:
        return (pairs.gather_tokens(f * scale_F.float()[pairs.latent_P], write_FI) for pairs, f in codes)

    every = written(torch.ones_like(f_F))
    x_base = (norm.apply(source.read(TRAIN, at))[:, :, BASE].flatten(1) for at in chunks)
    residual_F, left_I = along(x - xhat - bias_I for x, xhat in zip(x_base, every))
    inverse_F = torch.where(spread_F > 1e-12, 1 / spread_F, 0.0)
    change_F, step_F = torch.zeros_like(f_F), residual_F * inverse_F
    size = first = float(residual_F @ step_F)
    for _ in range(BASE_STEPS):
        if size <= 1e-6 * first:
            break
        product_F, _ = along(written(step_F))
        rate = size / float(step_F @ product_F)
        change_F, residual_F = change_F + rate * step_F, residual_F - rate * product_F
        before, size = size, float(residual_F @ (residual_F * inverse_F))
        step_F = residual_F * inverse_F + size / before * step_F
    offset_I = bias_I + left_I - (change_F * f_F) @ write_FI.double()
    return (1 + change_F).float(), offset_I.float().view(dictionary.sites, dictionary.width)


@torch.no_grad()
def _finish(
    state: State, source: _On, norm: Normalization, settings: FitSettings, plan: Plan, calibration_N: Tensor
) -> Fitted:
    """Calibrate the thresholds, then measure on held-out tokens."""
    dictionary = state.dictionary
    dictionary.requires_grad_(False)
    count = min(len(calibration_N), settings.calibration)
    some = source.order(calibration_N, generator(settings.seed, "calibration tokens"))[:count]
    index_N = calibration_N[some.sort().values]
    groups, weight_F = dictionary.groups(), dictionary.scales_F()
    pools: dict[str, list[Tensor]] = {group.name: [] for group in groups}
    on = 0
    for at in index_N.split(CHUNK):
        pre_NF = dictionary.pre(norm.apply(source.read(TRAIN, at)))
        gated = any(group.k is not None for group in groups)
        on += select(pre_NF, weight_F, groups).numel() if gated else int((pre_NF > 0).sum())
        value_NF = pre_NF.relu_().mul_(weight_F)
        for group in groups:
            if group.k is not None:
                part = value_NF[:, group.start : group.stop]
                # Four times its share is more than any chunk of shuffled tokens sends past the common
                # threshold.
                pools[group.name].append(
                    part.reshape(-1)[gates.batch_topk(part, min(4 * group.k + 1, group.stop - group.start))]
                )
    thresholds = {
        group.name: 0.0 if group.k is None else gates.calibrate(pools[group.name], round(count * group.k))
        for group in groups
    }
    threshold_F = thresholds_of(dictionary, thresholds)
    if dictionary.spec.target == "tuned":
        beta_F, offset_SD = base_writes(dictionary, source, norm, threshold_F)
        dictionary.base_scale_F.copy_(beta_F)
        dictionary.base_bias_SD.copy_(offset_SD)
    held_out = source.count(HELD_OUT)
    firings_F = torch.zeros_like(threshold_F, dtype=torch.long)
    named = RECONSTRUCTED[dictionary.spec.target]
    errors, sums, squares = (dict.fromkeys(named, 0.0) for _ in range(3))
    for at in torch.arange(held_out).split(CHUNK):
        x = norm.apply(source.read(HELD_OUT, at))
        f_NF = gates.threshold_gate(dictionary.pre(x), threshold_F)
        firings_F += (f_NF > 0).sum(0)
        error = (x - dictionary.decode(f_NF)).double()
        for name, e, y in (
            ("base", error[:, :, BASE], x[:, :, BASE]),
            ("tuned", error[:, :, TUNED], x[:, :, TUNED]),
            ("delta", delta_of(error), delta_of(x.double())),
        ):
            if name not in named:
                continue
            y = y.double()
            errors[name] += float(e.square().sum())
            sums[name] = sums[name] + y.sum(0)
            squares[name] += float(y.square().sum())
    ev = dict.fromkeys(("base", "tuned", "delta"), float("nan"))
    for name in named:
        spread = squares[name] - float((sums[name] ** 2).sum()) / held_out if held_out else 0.0
        ev[name] = 1 - errors[name] / spread if spread > 0 else float("nan")
    l0_training = on / count
    l0 = float(firings_F.sum()) / held_out if held_out else float("nan")
    quality = Quality(
        ev_base=ev["base"],
        ev_tuned=ev["tuned"],
        ev_delta=ev["delta"],
        l0_training=l0_training,
        l0_inference=l0,
        l0_gap=l0 / l0_training - 1 if l0_training else float("nan"),
        dead_share=float((state.silent_F >= plan.dead_tokens).float().mean()),
        silent_share=float((firings_F == 0).float().mean()),
        train_tokens=plan.steps * plan.batch,
        held_out_tokens=held_out,
        log_rms_ratio=tuple(norm.log_rms_ratio_S.tolist()),
        delta_ratio=math.sqrt(norm.delta_variance),
    )
    return Fitted(
        dictionary=dictionary.cpu(),
        normalization=norm.to("cpu"),
        thresholds=thresholds,
        sites=source.sites,
        quality=quality,
        curve=state.curve,
        firings_F=firings_F.cpu(),
        seed=settings.seed,
        source=source.fingerprint,
    )
