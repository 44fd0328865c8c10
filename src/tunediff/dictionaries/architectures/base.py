"""What every dictionary shares: parameters, encoding, decoding, and the two questions a variant answers."""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tunediff import kernels
from tunediff.core.axes import BASE, MODELS, TUNED, check
from tunediff.core.chance import generator
from tunediff.core.errors import SettingError
from tunediff.kernels import gates
from tunediff.kernels.sparse import PairCode

ALIKE = 0.7
"""Cosine above which two differences count as one."""
DRAWS = 4
"""Tokens drawn for each latent that starts as a difference."""

Target = Literal["both", "tuned", "difference"]
Form = Literal["base", "tuned", "shared"]


def require(ok: bool, what: str, expected: str, got: object) -> None:
    """Refuse a setting that is out of range."""
    if not ok:
        raise SettingError(what, expected=expected, got=str(got))


@dataclass(frozen=True)
class Spec:
    """The settings that every dictionary has; a variant's own `Spec` adds its fields."""

    variant: ClassVar[str]
    """The file name of the variant, or ``module:Class`` for one from elsewhere."""

    target: ClassVar[Target] = "both"
    """What is encoded and reconstructed: both models' streams, tuned's alone, or their difference tuned -
    base."""

    latents: int = 1024
    """How many latents. Too few: rare changes get none. Too many: slow, more of them dead, features split."""

    init_norm: float = 1.0
    """Length of each model's decoder vector at the start, in units of the normalized stream (element rms 1).
    Too small: slow to leave zero. Too large: the first steps only undo it."""

    @property
    def cuts(self) -> tuple[int, ...]:
        """Latents at which the reconstruction is cut for the objective, ascending; see `Pass.parts`."""
        return ()

    def __post_init__(self) -> None:
        require(self.latents >= 1, "latents is out of range", "at least 1", self.latents)
        require(self.init_norm > 0, "init_norm is out of range", "above 0", self.init_norm)


_Spec = Spec  # inside Dictionary the name Spec is the variant's own


@dataclass(frozen=True)
class Held:
    """Latents [start, stop) held to a form, exactly and from the start: "base" and "tuned" read and write that
    model alone (zeros for the other), "shared" writes one vector to both."""

    form: Form
    start: int
    stop: int


@dataclass(frozen=True)
class Group:
    """Latents [start, stop) that share one gate: BatchTopK keeping `k` a token on average, or plain ReLU if
    k is None. `held` names those among them that are not free; those from `differences` on start as differences between the
    models that training tokens show (see `Dictionary.begin`)."""

    name: str
    start: int
    stop: int
    k: float | None
    held: tuple[Held, ...] = ()
    differences: int | None = None

    def form_of(self, latent: int) -> str:
        """The form that the latent is held to, or the group's name."""
        return next((part.form for part in self.held if part.start <= latent < part.stop), self.name)


@dataclass(frozen=True, eq=False)
class Pass:
    """One training pass over normalized activations, which is all that an objective sees.

    x_NSMD, xhat_NSMD   target and reconstruction (decoder bias included); M is 1 unless both models are the
                        target
    parts               what the latents before, between and after `Spec.cuts` write, each (N, S, M, D); with the
                        decoder bias their sum is xhat
    code                the kept codes, see `tunediff.kernels.Code`
    progress            0 at the first step, 1 at the last
    """

    x_NSMD: Tensor
    xhat_NSMD: Tensor
    parts: tuple[Tensor, ...]
    code: kernels.Code
    progress: float

    @cached_property
    def error_NSMD(self) -> Tensor:
        """e^m = x^m - xhat^m."""
        return self.x_NSMD - self.xhat_NSMD


class Dictionary(nn.Module, abc.ABC):
    """A sparse code shared by two models at S sites: f >= 0 with one encoder row and one decoder vector a
    site and model.

    Shapes: encoder_FSMD, decoder_FSMD (never normalized: their lengths are the read-out), encoder_bias_F,
    decoder_bias_SMD. Input is normalized (`tunediff.dictionaries.sources.Normalization`), M = 2 with base first. Where the
    target is one stream, M is 1 in all four, and `read_FSMD`, `write_FSMD` and `bias_SMD` say what they are to
    both models' streams: whoever comes after training reads those.
    Pre-activations are the mean over models (the sum over sites) of the rows' products; Minder et al. 2025
    (2504.02922) sum over models too. With decoder vectors of length 1 the mean makes the first code the
    projection itself, and a one-group Delta-Crosscoder is then the same arithmetic as BatchTopK. A variant
    answers `groups` and `objective`, and nothing else.
    """

    Spec: ClassVar[type[_Spec]]
    spec: _Spec
    delta_variance: Tensor
    base_scale_F: Tensor
    base_bias_SD: Tensor

    def __init__(self, spec: _Spec, *, sites: int, width: int, seed: int = 0):
        super().__init__()
        self.spec, self.sites, self.width, self.seed = spec, sites, width, seed
        F = spec.latents
        draw = torch.randn(F, sites, 1, width, generator=generator(seed, "dictionary"))
        draw = draw / draw.flatten(1).norm(dim=1)[:, None, None, None] * spec.init_norm
        # One draw copied to both models and to both ends: independent draws fake an asymmetry.
        M = len(MODELS) if spec.target == "both" else 1
        both = draw.expand(F, sites, M, width)
        self.encoder_FSMD = nn.Parameter(both.clone())
        self.decoder_FSMD = nn.Parameter(both.clone())
        self.encoder_bias_F = nn.Parameter(torch.zeros(F))
        self.decoder_bias_SMD = nn.Parameter(torch.zeros(sites, M, width))
        self.register_buffer("delta_variance", torch.ones(()))
        if spec.target == "tuned":  # what base has of it, measured after training; until then all of it
            self.register_buffer("base_scale_F", torch.ones(F))
            self.register_buffer("base_bias_SD", torch.zeros(sites, width))
        self.hold()

    # -- what a variant answers ------------------------------------------------------------------------------

    @abc.abstractmethod
    def groups(self) -> tuple[Group, ...]:
        """The gates: groups of latents that together cover [0, F) in order, without overlap."""

    @abc.abstractmethod
    def objective(self, run: Pass) -> dict[str, Tensor]:
        """The parts of the loss, weighted, by name; their sum is minimized. The names never change between
        steps."""

    # -- what all share --------------------------------------------------------------------------------------

    @final
    @torch.no_grad()
    def hold(self) -> None:
        """Put parameters and gradients onto the forms that latents are held to.

        Adam moves equal entries with equal gradients alike and zeros with zero gradients not at all, so held
        once at the start and before every step, forms stay exact.
        """
        for part in (part for group in self.groups() for part in group.held):
            for whole in (self.encoder_FSMD, self.decoder_FSMD):
                for tensor in (whole, whole.grad):
                    if tensor is None:
                        continue
                    rows = tensor[part.start : part.stop]
                    if part.form != "shared":
                        rows[:, :, BASE if part.form == "tuned" else TUNED] = 0
                    elif whole is self.decoder_FSMD:
                        rows.copy_(rows.mean(2, keepdim=True))

    @final
    @torch.no_grad()
    def begin(self, x_NSMD: Tensor) -> None:
        """Before the first step, from normalized activations of training tokens: let latents that groups say start as readers
        and writers of differences.

        Each takes the direction v of the centered difference at one token: it reads v * (x^tuned - x^base), and writes v/2
        into tuned and -v/2 into base. Tokens are drawn in proportion to their energy (Frieze, Kannan & Vempala 2004), but none
        whose direction has a cosine above `ALIKE` with one that was drawn: latents that start alike share one change among
        them. Latents for which no token is left start at random, as all do without a difference.
        """
        parts = [(group.differences, group.stop) for group in self.groups() if group.differences is not None]
        if not parts:
            return
        require(
            self.spec.target == "both", "latents cannot start as differences", "both models as target", self.spec.target
        )
        delta_NI = delta_of(x_NSMD).flatten(1)
        delta_NI = delta_NI - delta_NI.mean(0)
        energy_N = delta_NI.double().square().sum(1).cpu()
        if not energy_N.sum() > 0:
            return
        for start, stop in parts:
            some = min(int((energy_N > 0).sum()), DRAWS * (stop - start))
            drawn = torch.multinomial(energy_N, some, generator=generator(self.seed, "differences", start))
            v_FI = _unlike(nn.functional.normalize(delta_NI[drawn.to(delta_NI.device)], dim=1), stop - start)
            v_FSD, stop = v_FI.view(-1, self.sites, self.width), start + len(v_FI)
            for whole, length in ((self.encoder_FSMD, 1.0), (self.decoder_FSMD, 0.5)):
                whole[start:stop, :, TUNED], whole[start:stop, :, BASE] = length * v_FSD, -length * v_FSD
        self.hold()

    @final
    def view(self, x_NSMD: Tensor) -> Tensor:
        """The target (N, S, M, D) in normalized streams; a difference is brought to variance 1, as streams
        are."""
        if self.spec.target == "both":
            return x_NSMD
        return x_NSMD[:, :, TUNED:] if self.spec.target == "tuned" else delta_of(x_NSMD)[:, :, None] / self._unit

    @final
    def read_FSMD(self, latents: slice = slice(None)) -> Tensor:
        """Rows of `latents` on both models' normalized streams, (F, S, 2, D): the pre-activation is rows * x,
        summed, plus encoder bias."""
        rows = self.encoder_FSMD[latents] / self.encoder_FSMD.shape[2] / self._unit
        if self.spec.target == "both":
            return rows
        return torch.cat([torch.zeros_like(rows) if self.spec.target == "tuned" else -rows, rows], 2)

    @final
    def write_FSMD(self, latents: slice = slice(None)) -> Tensor:
        """Vectors d_j^m of `latents` in both models' normalized streams, (F, S, 2, D).

        A latent of a difference writes it all into tuned. One of tuned's stream writes `base_scale_F` times as
        much into base.
        """
        write = self.decoder_FSMD[latents]
        if self.spec.target == "both":
            return write
        scale_F = self.base_scale_F[latents] if self.spec.target == "tuned" else write.new_zeros(len(write))
        return torch.cat([write * scale_F[:, None, None, None], write * self._unit], 2)

    @final
    def bias_SMD(self) -> Tensor:
        """What both models' normalized streams are taken to hold when no latent is on, (S, 2, D)."""
        bias = self.decoder_bias_SMD
        if self.spec.target == "both":
            return bias
        base = self.base_bias_SD[:, None] if self.spec.target == "tuned" else torch.zeros_like(bias)
        return torch.cat([base, bias * self._unit], 1)

    @final
    def norms_MF(self) -> Tensor:
        """|d_j^m| over sites and width, in normalized units, of both models."""
        return _norms_MF(self.write_FSMD())

    @final
    def weights_F(self) -> Tensor:
        """w_j = |d_j^base| + |d_j^tuned|, or the length of the one decoder vector."""
        return _norms_MF(self.decoder_FSMD).sum(0)

    @final
    @torch.no_grad()
    def scales_F(self) -> Tensor:
        """w_j without gradients: what gates scale codes by."""
        scales_F: Tensor = kernels.lengths(self.decoder_FSMD).norm(dim=1).sum(1)
        return scales_F

    @final
    def share_F(self) -> Tensor:
        """|d^tuned| / (|d^base| + |d^tuned|): 0 base only, 1/2 both, 1 tuned only (Lindsey et al. 2024)."""
        norms = self.norms_MF().detach()
        return torch.nan_to_num(norms[TUNED] / norms.sum(0), nan=0.5)

    @final
    def pre(self, x_NSMD: Tensor) -> Tensor:
        """Pre-activations (N, F) of normalized activations: one GEMM over all sites and models."""
        x_NI = self._inputs(self.view(x_NSMD))
        return torch.addmm(self.encoder_bias_F, x_NI, self.encoder_FSMD.flatten(1).T)

    @final  # type: ignore[misc]  # torch declares `forward` as an attribute
    def forward(self, x_NSMD: Tensor, *, progress: float = 1.0, k_factor: float = 1.0) -> Pass:
        """Encode, gate as in training (every group's k times `k_factor`), decode."""
        x_NSMD = self.view(check(x_NSMD, "NSMD", S=self.sites, M=len(MODELS), D=self.width))
        groups = self.groups()
        gated = any(group.k is not None for group in groups)
        gate = gate_of(groups, self.scales_F(), len(x_NSMD), k_factor) if gated else None
        code = kernels.encode(self._inputs(x_NSMD), self.encoder_FSMD.flatten(1), self.encoder_bias_F, gate)
        cuts, decoder_FI = self.spec.cuts, self.decoder_FSMD.flatten(1)
        decoded = code.decode(decoder_FI, cuts)
        # Taken apart at once and not by index: the gradient is then put together in one pass. Of one part it is there already.
        parts = tuple(part.view(x_NSMD.shape) for part in (decoded.unbind(1) if cuts else [decoded]))
        return Pass(x_NSMD, sum(parts[1:], parts[0]) + self.decoder_bias_SMD, parts, code, progress)

    @final
    def decode(self, f_NF: Tensor) -> Tensor:
        """xhat_NSMD of dense codes, decoder bias included, normalized units, both models."""
        flat = f_NF @ self.write_FSMD().flatten(1) + self.bias_SMD().flatten()
        return flat.view(-1, self.sites, len(MODELS), self.width)

    @final
    def auxiliary(self, run: Pass, dead_F: Tensor, k: int) -> Tensor:
        """AuxK over the dead latents of gated groups (see `gates.auxk`)."""
        gated_F = torch.zeros_like(dead_F)
        for group in self.groups():
            gated_F[group.start : group.stop] = group.k is not None
        dead_F = dead_F & gated_F
        # Pairs win where few of the dead are taken (measured); a GPU's host never learns how many there are.
        if isinstance(run.code, PairCode) and not (run.code.host_waits and int(dead_F.sum()) < 4 * k):
            aux = run.code.among(self.scales_F() * dead_F, min(k, dead_F.numel()))
            explained_NI = aux.decode(self.decoder_FSMD.flatten(1))[:, 0]
            return gates.unexplained(run.error_NSMD.flatten(1), explained_NI).masked_fill(~dead_F.any(), 0.0)
        return gates.auxk(
            self._inputs(run.x_NSMD),
            run.error_NSMD.detach().flatten(1),
            self.encoder_FSMD,
            self.encoder_bias_F,
            self.decoder_FSMD,
            self.scales_F(),
            dead_F,
            k,
        )

    @final
    @torch.no_grad()
    def mirrored(self) -> Dictionary:
        """The same dictionary with base and tuned swapped; latents held to one model are then the other's."""
        require(self.spec.target == "both", "this dictionary has no mirror", "both as target", self.spec.target)
        twin = type(self)(self.spec, sites=self.sites, width=self.width, seed=self.seed).to(self.encoder_FSMD)
        twin.load_state_dict(self.state_dict())
        for name in ("encoder_FSMD", "decoder_FSMD"):
            getattr(twin, name).copy_(getattr(self, name).flip(2))
        twin.decoder_bias_SMD.copy_(self.decoder_bias_SMD.flip(1))
        return twin

    @final
    def _inputs(self, x_NSMD: Tensor) -> Tensor:
        """Sites and models side by side, divided so that the product is the models' mean."""
        return x_NSMD.flatten(1) / x_NSMD.shape[2] if x_NSMD.shape[2] > 1 else x_NSMD.flatten(1)

    @property
    def _unit(self) -> Tensor | float:
        """Root mean square of what `view` gives, before it is brought to 1."""
        if self.spec.target != "difference":
            return 1.0
        return self.delta_variance.masked_fill(~(self.delta_variance > 0), 1.0).sqrt()


def _norms_MF(vectors_FSMD: Tensor) -> Tensor:
    norms_FM: Tensor = vectors_FSMD.transpose(1, 2).flatten(2).norm(dim=2)
    return norms_FM.T


def gate_of(groups: tuple[Group, ...], weight_F: Tensor, tokens: int, k_factor: float = 1.0) -> gates.Gate:
    """The groups' gates over a batch of that many tokens; a group without k keeps every positive code."""
    sizes = [group.stop - group.start for group in groups]
    per_token = [n if g.k is None else min(g.k * k_factor, n) for g, n in zip(groups, sizes)]
    return gates.Gate(weight_F, tuple((g.start, g.stop, round(tokens * k)) for g, k in zip(groups, per_token)))


def select(pre_NF: Tensor, weight_F: Tensor, groups: tuple[Group, ...]) -> Tensor:
    """Flat ascending indices of the codes that the groups' gates keep, by the scaled code v = relu(pre) *
    w."""
    return gates.keep(pre_NF, weight_F, gate_of(groups, weight_F, len(pre_NF)).parts)


def mean_squared_error(run: Pass) -> Tensor:
    """(MSE_base + MSE_tuned) / 2, or the one target's; the mean over tokens, sites and dimensions; 1 would be no
    better than the mean."""
    loss: Tensor = _MeanSquare.apply(run.xhat_NSMD, run.error_NSMD.detach())  # type: ignore[no-untyped-call]
    return loss


class _MeanSquare(torch.autograd.Function):
    """The mean square of an error that is there already; torch's own takes the difference again, twice."""

    @staticmethod
    def forward(ctx: Any, xhat: Tensor, error: Tensor) -> Tensor:
        ctx.save_for_backward(error)
        return (kernels.norm([error]).double().square() / error.numel()).to(error.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (error,) = ctx.saved_tensors
        return error * (grad * (-2 / error.numel())), None


def weighted_norm(run: Pass, weight_F: Tensor) -> Tensor:
    """Mean over tokens of sum_j f_j w_j, divided by sqrt(S*D) so that one setting serves every width.

    Lindsey et al. 2024 do not divide. A stream of element rms 1 has length sqrt(S*D), so undivided the same
    coefficient would shrink a wide model's codes more.
    """
    N, S, _, D = run.x_NSMD.shape
    return run.code.weighted(weight_F) / (N * math.sqrt(S * D))


def delta_of(x_NSMD: Tensor) -> Tensor:
    """Tuned minus base, (N, S, D)."""
    base, tuned = x_NSMD.unbind(2)
    return tuned - base


def _unlike(unit_NI: Tensor, most: int, block: int = 256) -> Tensor:
    """The first `most` rows of unit length of which none has a cosine above `ALIKE` with an earlier one that is kept."""
    kept_FI = unit_NI[:0]
    for rows_NI in unit_NI.split(block):
        rows_NI = rows_NI[(rows_NI @ kept_FI.T <= ALIKE).all(1)]
        alike = (rows_NI @ rows_NI.T > ALIKE).cpu()
        chosen: list[int] = []
        for row in range(len(rows_NI)):
            if not alike[row, chosen].any():
                chosen.append(row)
        kept_FI = torch.cat([kept_FI, rows_NI[chosen]])[:most]
        if len(kept_FI) == most:
            break
    return kept_FI
