"""Base class of all dictionaries: parameters, encoding and decoding; a variant adds its gates and its loss."""

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
"""Cosine above which two difference vectors count as the same direction."""
DRAWS = 4
"""Tokens drawn for each latent that is initialized from a difference."""

Target = Literal["both", "tuned", "difference"]
Form = Literal["base", "tuned", "shared"]


def require(ok: bool, what: str, expected: str, got: object) -> None:
    """Refuse a setting that is out of range."""
    if not ok:
        raise SettingError(what, expected=expected, got=str(got))


@dataclass(frozen=True)
class Spec:
    """Settings that every dictionary has; the `Spec` of a variant adds its own fields."""

    variant: ClassVar[str]
    """File name of the variant, or ``module:Class`` for a variant outside this package."""

    target: ClassVar[Target] = "both"
    """Activations that are encoded and reconstructed: those of both models, those of tuned, or tuned minus base."""

    latents: int = 1024
    """Number of latents. Too few: rare changes get no latent. Too many: slow, more dead latents, split features."""

    init_norm: float = 1.0
    """Initial length of each model's decoder vector, in units of the normalized stream (element rms 1).
    Too small: vectors are slow to leave zero. Too large: the first steps only shorten them."""

    @property
    def cuts(self) -> tuple[int, ...]:
        """Latents, ascending, at which the reconstruction is split into parts for the objective; see `Pass.parts`."""
        return ()

    def __post_init__(self) -> None:
        require(self.latents >= 1, "latents is out of range", "at least 1", self.latents)
        require(self.init_norm > 0, "init_norm is out of range", "above 0", self.init_norm)


_Spec = Spec  # inside Dictionary, the name Spec means the variant's own settings class


@dataclass(frozen=True)
class Held:
    """A hard constraint on latents [start, stop), exact from the first step.

    Latents of form "base" or "tuned" read and write that model alone; the other model's entries are zero. Latents of
    form "shared" write the same vector into both models.
    """

    form: Form
    start: int
    stop: int


@dataclass(frozen=True)
class Group:
    """Latents [start, stop) that share one gate.

    name          name of the group
    k             mean codes that BatchTopK keeps on a token; None: plain ReLU
    held          constraints on some of the group's latents
    differences   first latent that is initialized from a difference of activations (see `Dictionary.begin`); None: no
                  latent is
    """

    name: str
    start: int
    stop: int
    k: float | None
    held: tuple[Held, ...] = ()
    differences: int | None = None

    def form_of(self, latent: int) -> str:
        """Return the form of the constraint on a latent, or the group's name for a free latent."""
        return next((part.form for part in self.held if part.start <= latent < part.stop), self.name)


@dataclass(frozen=True, eq=False)
class Pass:
    """One forward pass over normalized activations in training: the only input of an objective.

    x_NSMD, xhat_NSMD   target and reconstruction (decoder bias included); M is 1 unless both models are the
                        target
    parts               reconstructions (N, S, M, D) by the latents before, between and after `Spec.cuts`; the parts
                        and the decoder bias sum to xhat
    code                codes that the gates keep, see `tunediff.kernels.Code`
    progress            0 at the first step, 1 at the last
    """

    x_NSMD: Tensor
    xhat_NSMD: Tensor
    parts: tuple[Tensor, ...]
    code: kernels.Code
    progress: float

    @cached_property
    def error_NSMD(self) -> Tensor:
        """Reconstruction error x - xhat of each model."""
        return self.x_NSMD - self.xhat_NSMD


class Dictionary(nn.Module, abc.ABC):
    """A sparse code f >= 0 shared by two models at S sites, with one encoder row and one decoder vector for each site
    and model.

    The parameters are encoder_FSMD, decoder_FSMD, encoder_bias_F and decoder_bias_SMD. Decoder vectors are never
    normalized, because their lengths in the two models are the result. Input is normalized
    (`tunediff.dictionaries.sources.Normalization`), with M = 2 and base first. If the target is one stream, M is 1 in
    all parameters; `read_FSMD`, `write_FSMD` and `bias_SMD` then give their equivalents for both models' streams.

    A pre-activation sums the encoder rows' products over sites and takes their mean over models; Minder et al. 2025
    (2504.02922) sum over models too. With decoder vectors of length 1, the mean makes the first code the projection
    itself. A Delta-Crosscoder with one group is then the same arithmetic as BatchTopK. A variant implements `groups`
    and `objective` only.
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
        # Both models, encoder and decoder start from one draw, because independent draws would look like a change.
        M = len(MODELS) if spec.target == "both" else 1
        both = draw.expand(F, sites, M, width)
        self.encoder_FSMD = nn.Parameter(both.clone())
        self.decoder_FSMD = nn.Parameter(both.clone())
        self.encoder_bias_F = nn.Parameter(torch.zeros(F))
        self.decoder_bias_SMD = nn.Parameter(torch.zeros(sites, M, width))
        self.register_buffer("delta_variance", torch.ones(()))
        if spec.target == "tuned":  # measured after training by `base_writes`; 1 until then
            self.register_buffer("base_scale_F", torch.ones(F))
            self.register_buffer("base_bias_SD", torch.zeros(sites, width))
        self.hold()

    # -- implemented by each variant -------------------------------------------------------------------------

    @abc.abstractmethod
    def groups(self) -> tuple[Group, ...]:
        """Return the groups of latents, each with its gate; they cover [0, F) in order, without overlap."""

    @abc.abstractmethod
    def objective(self, run: Pass) -> dict[str, Tensor]:
        """Return the weighted terms of the loss by name; training minimizes their sum, and the names are the same at
        every step."""

    # -- shared by all variants ------------------------------------------------------------------------------

    @final
    @torch.no_grad()
    def hold(self) -> None:
        """Project parameters and gradients onto the constraints of `Group.held`.

        Adam keeps entries equal if their gradients are equal, and leaves zeros with zero gradients at zero. Projecting
        at the start and before every step therefore keeps the constraints exact.
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
        """Initialize the latents that `Group.differences` names from differences of normalized training activations.

        Each such latent takes the direction v of the centered difference tuned - base at one token. The latent reads v
        * (x^tuned - x^base), and writes v/2 into tuned and -v/2 into base. Tokens are drawn in proportion to their
        squared difference (Frieze, Kannan & Vempala 2004). A token is skipped if its direction has a cosine above
        `ALIKE` with an earlier one, because latents with similar vectors split one change among them. A latent without
        a token keeps its random vectors, and so do all latents if the models do not differ.
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
        """Return the target (N, S, M, D) from normalized streams; a difference is scaled to variance 1, like a
        stream."""
        if self.spec.target == "both":
            return x_NSMD
        return x_NSMD[:, :, TUNED:] if self.spec.target == "tuned" else delta_of(x_NSMD)[:, :, None] / self._unit

    @final
    def read_FSMD(self, latents: slice = slice(None)) -> Tensor:
        """Return encoder rows (F, S, 2, D) of `latents` for both models' normalized streams.

        The pre-activation is the sum of rows * x over sites, models and width, plus the encoder bias.
        """
        rows = self.encoder_FSMD[latents] / self.encoder_FSMD.shape[2] / self._unit
        if self.spec.target == "both":
            return rows
        return torch.cat([torch.zeros_like(rows) if self.spec.target == "tuned" else -rows, rows], 2)

    @final
    def write_FSMD(self, latents: slice = slice(None)) -> Tensor:
        """Return decoder vectors d_j^m (F, S, 2, D) of `latents` for both models' normalized streams.

        If the target is the difference, a latent writes into tuned alone. If the target is tuned, the vector for base
        is `base_scale_F` times the vector for tuned.
        """
        write = self.decoder_FSMD[latents]
        if self.spec.target == "both":
            return write
        scale_F = self.base_scale_F[latents] if self.spec.target == "tuned" else write.new_zeros(len(write))
        return torch.cat([write * scale_F[:, None, None, None], write * self._unit], 2)

    @final
    def bias_SMD(self) -> Tensor:
        """Return the reconstruction (S, 2, D) of both models' normalized streams where no latent is on."""
        bias = self.decoder_bias_SMD
        if self.spec.target == "both":
            return bias
        base = self.base_bias_SD[:, None] if self.spec.target == "tuned" else torch.zeros_like(bias)
        return torch.cat([base, bias * self._unit], 1)

    @final
    def norms_MF(self) -> Tensor:
        """Return each model's decoder lengths |d_j^m| (M, F) over sites and width, in normalized units."""
        return _norms_MF(self.write_FSMD())

    @final
    def weights_F(self) -> Tensor:
        """Return w_j = |d_j^base| + |d_j^tuned| (F,), or the length of the decoder vector if there is only one."""
        return _norms_MF(self.decoder_FSMD).sum(0)

    @final
    @torch.no_grad()
    def scales_F(self) -> Tensor:
        """Return w_j (F,) without gradients: the factor by which gates scale codes."""
        scales_F: Tensor = kernels.lengths(self.decoder_FSMD).norm(dim=1).sum(1)
        return scales_F

    @final
    def share_F(self) -> Tensor:
        """Return |d^tuned| / (|d^base| + |d^tuned|) (F,): 0 base only, 1/2 both, 1 tuned only (Lindsey et al. 2024)."""
        norms = self.norms_MF().detach()
        return torch.nan_to_num(norms[TUNED] / norms.sum(0), nan=0.5)

    @final
    def pre(self, x_NSMD: Tensor) -> Tensor:
        """Return pre-activations (N, F) of normalized activations, by one matrix product over all sites and models."""
        x_NI = self._inputs(self.view(x_NSMD))
        return torch.addmm(self.encoder_bias_F, x_NI, self.encoder_FSMD.flatten(1).T)

    @final  # type: ignore[misc]  # torch declares `forward` as an attribute
    def forward(self, x_NSMD: Tensor, *, progress: float = 1.0, k_factor: float = 1.0) -> Pass:
        """Encode, select codes by the training gates, and decode.

        progress   share of training that is done, 0 to 1
        k_factor   factor on the k of every group
        """
        x_NSMD = self.view(check(x_NSMD, "NSMD", S=self.sites, M=len(MODELS), D=self.width))
        groups = self.groups()
        gated = any(group.k is not None for group in groups)
        gate = gate_of(groups, self.scales_F(), len(x_NSMD), k_factor) if gated else None
        code = kernels.encode(self._inputs(x_NSMD), self.encoder_FSMD.flatten(1), self.encoder_bias_F, gate)
        cuts, decoder_FI = self.spec.cuts, self.decoder_FSMD.flatten(1)
        decoded = code.decode(decoder_FI, cuts)
        # `unbind` instead of indexing lets autograd assemble the gradient in one pass; one part needs no assembly.
        parts = tuple(part.view(x_NSMD.shape) for part in (decoded.unbind(1) if cuts else [decoded]))
        return Pass(x_NSMD, sum(parts[1:], parts[0]) + self.decoder_bias_SMD, parts, code, progress)

    @final
    def decode(self, f_NF: Tensor) -> Tensor:
        """Return xhat_NSMD of dense codes for both models, in normalized units, decoder bias included."""
        flat = f_NF @ self.write_FSMD().flatten(1) + self.bias_SMD().flatten()
        return flat.view(-1, self.sites, len(MODELS), self.width)

    @final
    def auxiliary(self, run: Pass, dead_F: Tensor, k: int) -> Tensor:
        """Return the AuxK loss of the dead latents in groups with a BatchTopK gate (see `gates.auxk`)."""
        gated_F = torch.zeros_like(dead_F)
        for group in self.groups():
            gated_F[group.start : group.stop] = group.k is not None
        dead_F = dead_F & gated_F
        # Pairs are faster if few of the dead latents are used (measured). On a GPU, counting them would make the host
        # wait.
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
        """Return the same dictionary with base and tuned swapped; a latent held to one model then belongs to the
        other."""
        require(self.spec.target == "both", "this dictionary has no mirror", "both as target", self.spec.target)
        twin = type(self)(self.spec, sites=self.sites, width=self.width, seed=self.seed).to(self.encoder_FSMD)
        twin.load_state_dict(self.state_dict())
        for name in ("encoder_FSMD", "decoder_FSMD"):
            getattr(twin, name).copy_(getattr(self, name).flip(2))
        twin.decoder_bias_SMD.copy_(self.decoder_bias_SMD.flip(1))
        return twin

    @final
    def _inputs(self, x_NSMD: Tensor) -> Tensor:
        """Flatten sites and models into one axis (N, I), divided by M so that the encoder product is a mean over
        models."""
        return x_NSMD.flatten(1) / x_NSMD.shape[2] if x_NSMD.shape[2] > 1 else x_NSMD.flatten(1)

    @property
    def _unit(self) -> Tensor | float:
        """Root mean square of the target before `view` scales it to 1."""
        if self.spec.target != "difference":
            return 1.0
        return self.delta_variance.masked_fill(~(self.delta_variance > 0), 1.0).sqrt()


def _norms_MF(vectors_FSMD: Tensor) -> Tensor:
    norms_FM: Tensor = vectors_FSMD.transpose(1, 2).flatten(2).norm(dim=2)
    return norms_FM.T


def gate_of(groups: tuple[Group, ...], weight_F: Tensor, tokens: int, k_factor: float = 1.0) -> gates.Gate:
    """Return the gate over a batch of `tokens` tokens; a group without k keeps every positive code."""
    sizes = [group.stop - group.start for group in groups]
    per_token = [n if g.k is None else min(g.k * k_factor, n) for g, n in zip(groups, sizes)]
    return gates.Gate(weight_F, tuple((g.start, g.stop, round(tokens * k)) for g, k in zip(groups, per_token)))


def select(pre_NF: Tensor, weight_F: Tensor, groups: tuple[Group, ...]) -> Tensor:
    """Return flat ascending indices of the codes that the groups' gates keep, by the scaled code v = relu(pre) * w."""
    return gates.keep(pre_NF, weight_F, gate_of(groups, weight_F, len(pre_NF)).parts)


def mean_squared_error(run: Pass) -> Tensor:
    """Return the mean squared error over tokens, sites, models and dimensions.

    With both models as the target, the loss is (MSE_base + MSE_tuned) / 2. Predicting the mean gives about 1.
    """
    loss: Tensor = _MeanSquare.apply(run.xhat_NSMD, run.error_NSMD.detach())  # type: ignore[no-untyped-call]
    return loss


class _MeanSquare(torch.autograd.Function):
    """Mean square of a given error; torch's loss would compute the difference again, forward and backward."""

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
    """Return the mean over tokens of sum_j f_j w_j, divided by sqrt(S*D) so that one coefficient suits every width.

    Lindsey et al. 2024 do not divide. A stream of element rms 1 has length sqrt(S*D), so without the division the same
    coefficient would shrink the codes of a wide model more.
    """
    N, S, _, D = run.x_NSMD.shape
    return run.code.weighted(weight_F) / (N * math.sqrt(S * D))


def delta_of(x_NSMD: Tensor) -> Tensor:
    """Return tuned minus base, (N, S, D)."""
    base, tuned = x_NSMD.unbind(2)
    return tuned - base


def _unlike(unit_NI: Tensor, most: int, block: int = 256) -> Tensor:
    """Keep up to `most` unit rows in order, skipping each row whose cosine with a kept row is above `ALIKE`."""
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
