"""Settings of a fit, the schedule of its steps, and the state that training changes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tunediff import kernels
from tunediff.core.errors import SettingError
from tunediff.dictionaries.architectures.base import Dictionary, Spec, require


@dataclass(frozen=True)
class FitSettings:
    """How a dictionary is trained. Same settings, spec and source give the same bytes on the same CPU."""

    steps: int | None = 600
    """Optimizer steps; None derives them from `epochs`. Too few: dead and half-learned latents. Too many: only slow."""

    epochs: float = 4.0
    """Passes over the training tokens when `steps` is None."""

    batch: int = 512
    """Tokens a step. Too few: noisy gates, and rare latents are forgotten. Too many: few steps for the same text."""

    learning_rate: float | None = None
    """Peak Adam step size; None takes 1e-3 below 10,000 latents, else 1e-4. Too small: training does not finish. Too
    large: dead latents."""

    warmup: float = 0.05
    """Share of the steps (1,000 at most) over which the step size grows from 0."""

    decay: float = 0.2
    """Share of the steps, at the end, over which the step size falls to 0. Too short: noisy final vectors."""

    clip: float = 1.0
    """Largest global gradient norm. Too small: slow training. Too large: one odd batch moves every parameter."""

    anneal_from: float = 1.0
    """Factor on every gate's k at the first step, which falls to 1; 1 switches annealing off. A higher factor gives
    more latents an early gradient."""

    anneal: float = 0.1
    """Share of the steps over which the factor on k falls to 1."""

    aux_weight: float = 1 / 32
    """Weight of the AuxK loss, in units of the error's variance (Gao et al. 2024). At 0 dead latents stay dead."""

    aux_k: int = 512
    """Most dead latents that AuxK uses on a token, never more than half the stream's width."""

    dead_window: float = 0.02
    """A latent silent for this share of all tokens (10 million at most) counts as dead. Too short: rare latents are
    trained as if dead. Too long: dead latents are helped late."""

    calibration: int = 65_536
    """Most tokens on which the inference thresholds are set. Too few: the mean L0 at inference misses k."""

    calibration_share: float = 0.1
    """Share of the training documents (of the tokens, where documents are not known) on which thresholds are set and
    the dictionary is not trained. At 0 thresholds are set on training text: after many epochs codes are larger there,
    and L0 elsewhere misses k by up to a factor of 2. Too large: less text to train on."""

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
        require(self.aux_weight >= 0, "aux_weight is out of range", "at least 0", self.aux_weight)


@dataclass(frozen=True)
class Schedule:
    """The steps of a fit, derived from its settings and its number of training tokens.

    count         training tokens
    batch         tokens a step
    batches       steps an epoch
    steps         steps in all
    rate          peak Adam step size
    dead_tokens   tokens of silence after which a latent counts as dead
    """

    count: int
    batch: int
    batches: int
    steps: int
    rate: float
    dead_tokens: float

    @classmethod
    def of(cls, spec: Spec, settings: FitSettings, count: int) -> Schedule:
        """Derive the schedule; fewer training tokens than a batch give smaller batches."""
        if count < 1:
            raise SettingError("there are no training tokens", remedy="--set corpus.tokens=20000")
        batch = min(settings.batch, count)
        steps = settings.steps or max(1, round(count * settings.epochs / batch))
        rate = settings.learning_rate or (1e-3 if spec.latents < 10_000 else 1e-4)
        dead = min(10_000_000, settings.dead_window * steps * batch)
        return cls(count, batch, count // batch, steps, rate, max(dead, batch))

    def rate_at(self, step: int, settings: FitSettings) -> float:
        """Adam step size at this step: linear warm-up, plateau, linear decay to 0."""
        warm = min(1000, settings.warmup * self.steps)
        down = settings.decay * self.steps
        return self.rate * min(1.0, (step + 1) / warm if warm else 1.0, (self.steps - step) / down if down else 1.0)

    def k_factor(self, step: int, settings: FitSettings) -> float:
        """Factor on every gate's k at this step."""
        length = settings.anneal * self.steps
        left = max(0.0, 1 - step / length) if length else 0.0
        return 1 + (settings.anneal_from - 1) * left


@dataclass
class State:
    """Everything that training changes, and so everything that a checkpoint holds."""

    dictionary: Dictionary
    optimizer: kernels.Adam
    silent_F: Tensor
    step: int
    curve: list[dict[str, float]]

    @classmethod
    def new(cls, dictionary: Dictionary, schedule: Schedule) -> State:
        """Return the state before the first step."""
        optimizer = kernels.Adam(dictionary.parameters(), schedule.rate)
        silent_F = torch.zeros_like(dictionary.encoder_bias_F, dtype=torch.long, requires_grad=False)
        return cls(dictionary, optimizer, silent_F, 0, [])

    def tensors(self) -> dict[str, Tensor]:
        """Return the state as named tensors for one safetensors file."""
        out = {"step": torch.tensor(self.step), "silent_F": self.silent_F}
        for name, parameter in self.dictionary.named_parameters():
            out[f"parameter.{name}"] = parameter
            for part, value in self.optimizer.state[parameter].items():
                out[f"adam.{part}.{name}"] = value
        for column in self.curve[0] if self.curve else ():
            out[f"curve.{column}"] = torch.tensor([row[column] for row in self.curve], dtype=torch.float64)
        return out

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Restore the state from named tensors that `tensors` returned."""
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
