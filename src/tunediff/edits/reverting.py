"""Edits: take chosen changes out of a tuned model, live and reversible, or baked into weights.

Two operations, both on the difference of weights only, so base is never touched and a baked edit is the live one:

revert   every touched linear map W + D becomes W + D M, with M such that inputs seen where the changes are on get
         base's map back and inputs seen elsewhere keep tuned's (least squares, below)
scale    W + D becomes W + (1 - strength) D everywhere: plain adapter scaling, the control anybody can have

The least squares: with C1 and C0 the second moments of a map's inputs on and off the changes, D' minimizes
strength |D' x|^2 on C1 + |(D' - D) x|^2 on C0 + ridge |D' - D|^2, so M = (C0 + ridge)(C0 + strength C1 + ridge)^-1.
Related: MEMIT's closed form (Meng et al. 2023, 2210.07229) and AlphaEdit's kept set (Fang et al. 2025, 2410.02355),
which insert facts; here the target is base's own map, so nothing is to be inserted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tunediff.core.chance import generator
from tunediff.core.errors import NumericsError, within
from tunediff.models.deltas import Delta, counterparts
from tunediff.models.network import LanguageModel, Watch
from tunediff.models.pair import Pair
from tunediff.texts.tokens import Tokens


@dataclass(frozen=True)
class EditSettings:
    """How changes are taken out."""

    strength: float = 1.0
    """Weight of giving base's map back against keeping tuned's, at equal mass of text (0..inf): too little leaves the
    behavior, too much takes neighbors with it."""
    ridge: float = 1e-3
    """Pull toward tuned's map on inputs hardly seen, as a share of the mean squared input: too little lets rare inputs
    be reverted on no evidence, too much blunts the edit."""
    spread: bool = True
    """Whether a change counts as on from its first firing in a row to the row's end, or only where it fires."""
    tokens: int = 4000
    """Training tokens from which moments are taken: a third where the changes are on the most, a third anywhere in what the
    models wrote, and a third neutral, where tuned's maps are kept whatever fires."""
    bills: int = 1
    """How many of the first confirmed changes `diff` bills the undoing of."""
    controls: int = 1
    """Edits of equal energy that the bill is held against: so many along random directions, and as many of the same edit
    aimed at random text."""

    def __post_init__(self) -> None:
        within("edit", self, strength=0, ridge=0, tokens=1, bills=0, controls=0)


@dataclass(frozen=True, eq=False)
class Moments:
    """Second moments (I, I) of one linear map's inputs, summed over tokens where the changes are on and where not."""

    on_II: Tensor
    off_II: Tensor


@dataclass(frozen=True, eq=False)
class Edit:
    """A reversible operation on one tuned model: other values for some of its parameters."""

    name: str
    operation: str
    changes: tuple[str, ...]
    tensors: Mapping[nn.Parameter, Tensor]

    @contextmanager
    def on(self, model: LanguageModel) -> Iterator[LanguageModel]:
        """The edited model, usable inside; `model` itself is bit-identical before, inside and after."""
        yield self.applied(model)

    def applied(self, model: LanguageModel) -> LanguageModel:
        """The edited model as a side of its own, for as long as one likes; it holds the edit during its runs only."""
        return model.variant(f"{model.name} without {', '.join(self.changes)}", self.tensors)


def input_moments(
    model: LanguageModel,
    deltas: Sequence[Delta],
    tokens: Tokens,
    on_CR: Sequence[Sequence[Tensor]],
    batch_tokens: int = 2048,
) -> list[dict[str, Moments]]:
    """Moments of every map's inputs over `tokens`, by map name, for each of several ways C of saying what is on.

    on_CR   for each way and row, how much each of the row's tokens counts as on (0..1), shape (T of the row,)
    """
    names = {delta.linear: delta.name for delta in deltas}
    ways = len(on_CR)
    sums: dict[str, Tensor] = {}
    # Maps that read the very same tensor (query, key, value) share their products.
    last: list[tuple[Tensor, str]] = []
    reads: dict[str, str] = {}
    cells: list[Any] = [None, []]

    def see(module: nn.Module, x_BTI: Tensor, seen_BT: Tensor, weight_CN: Tensor) -> None:
        name = names[module]
        if last and last[0][0] is x_BTI:
            reads[name] = last[0][1]
            return
        last[:] = [(x_BTI, name)]
        x_NI = x_BTI[seen_BT].float()
        if cells[0] is not weight_CN:
            cells[:] = [weight_CN, _cells(weight_CN)]
        for which, mass_N in cells[1]:
            some = mass_N > 0
            x = x_NI[some] * mass_N[some, None].sqrt().to(x_NI)
            product_II = x.T @ x
            if name not in sums:
                sums[name] = x.new_zeros(ways, 2, *product_II.shape)
            for c in range(
                ways
            ):  # a difference of two sums, all and on, would not be definite where a change is on everywhere
                sums[name][c, int(c not in which)] += product_II

    for batch in tokens.batches(batch_tokens):
        weight_BTC = torch.zeros(*batch.mask_BT.shape, ways + 1)
        weight_BTC[..., ways] = batch.mask_BT.float()
        for c, on_R in enumerate(on_CR):
            for b, row in enumerate(batch.rows_B.tolist()):
                weight_BTC[b, : len(on_R[row]), c] = on_R[row]
        last.clear()
        model.read(batch.ids_BT, (), True, wanted_BT=batch.mask_BT, watch=Watch(list(names), weight_BTC, see))
    # Maps that share their inputs get the very same object, so that their M is solved for once.
    shared = [{name: Moments(*s[c]) for name, s in sums.items()} for c in range(ways)]
    return [{d.name: moments[reads.get(d.name, d.name)] for d in deltas} for moments in shared]


def _cells(weight_CN: Tensor) -> list[tuple[list[int], Tensor]]:
    """Weights as sets of ways that count alike and how much so at each token (N,): each token is then multiplied out about
    once, not once for each way."""
    cells: dict[tuple[int, ...], Tensor] = {}
    levels_CN, order_CN = weight_CN.sort(0, descending=True)
    for c, step_N in enumerate(levels_CN - torch.cat([levels_CN[1:], torch.zeros_like(levels_CN[:1])])):
        sets_NC = order_CN[: c + 1].sort(0).values.T
        for which in sets_NC[step_N > 0].unique(dim=0):
            cells.setdefault(tuple(which.tolist()), torch.zeros_like(step_N)).add_(step_N * (sets_NC == which).all(1))
    return [(list(which), mass_N) for which, mass_N in cells.items()]


def revert_map(moments: Moments, settings: EditSettings) -> Callable[[Tensor], Tensor]:
    """What takes a map D (O, I) to D M in float64; see the module's first lines. Both kinds of text are brought to equal
    mass first. M itself is never formed: one factorization, and as many solutions as D has rows (for a LoRA, its rank)."""
    mass_on, mass_off = (m.diagonal().double().sum() for m in (moments.on_II, moments.off_II))
    if not mass_on > 0:
        return lambda map_OI: map_OI.double()
    # In place where it can be: these are as large as a map's inputs are wide, squared.
    on, kept = moments.on_II.double().div_(mass_on), moments.off_II.double().div_(mass_off.clamp_min(1e-30))
    ridge, added = max(settings.ridge, 1e-9) / len(on), 0.0
    for _ in range(12):  # where changes are on nearly everywhere, what is left of two float32 sums need not be definite
        kept.diagonal().add_(ridge - added)
        factor, failed = torch.linalg.cholesky_ex(torch.add(kept, on, alpha=settings.strength))
        if not failed:
            break
        ridge, added = 10 * ridge, ridge
    else:
        raise NumericsError(
            "the inputs of a map have no usable second moments",
            expected="finite activations",
            remedy="--set pair.dtype=float32",
        )
    return lambda map_OI: torch.cholesky_solve((map_OI.to(kept) @ kept).T, factor).T


def reverting(
    pair: Pair,
    name: str,
    changes: Sequence[str],
    moments: Mapping[str, Moments],
    settings: EditSettings = EditSettings(),
    energy_of: Edit | None = None,
) -> Edit:
    """The edit that gives base's maps back where the changes are on.

    energy_of   bring what is taken out of every map's output on this text to the energy that this edit takes out of it: a
                fair control
    """
    tensors: dict[nn.Parameter, Tensor] = {}
    maps: dict[int, Callable[[Tensor], Tensor]] = {}  # maps that share their inputs follow one another
    for delta in pair.deltas():
        found = moments[delta.name]
        if id(found) not in maps:
            maps.clear()  # before the next ones are made, which are as large
            maps[id(found)] = revert_map(found, settings)
        mine = delta.with_inputs(maps[id(found)])
        if energy_of is not None:
            mine = _of_energy(delta, mine, energy_of, found.on_II + found.off_II)
        tensors.update(mine)
    return Edit(name, "revert", tuple(changes), tensors)


def random_directions(pair: Pair, name: str, moments: Mapping[str, Moments], energy_of: Edit, seed: int) -> Edit:
    """A control: from every map's inputs take random directions, drawn from the text's own covariance so that inputs do vary
    along them, with the energy that `energy_of` takes out of its output on this text."""
    tensors: dict[nn.Parameter, Tensor] = {}
    roots: dict[int, tuple[Tensor, Tensor]] = {}
    for delta in pair.deltas():
        found = moments[delta.name]
        if id(found) not in roots:
            roots.clear()
            total_II = found.on_II + found.off_II
            # Of the trace, which no eigenvalue exceeds: sums of float32 products are only so definite.
            ridge = 1e-5 * total_II.diagonal().sum() * torch.eye(len(total_II))
            roots[id(found)] = total_II, torch.linalg.cholesky(total_II.double() + ridge).T.float()
        total_II, root_II = roots[id(found)]
        rng = generator(seed, "random directions", name, delta.name)
        noise = torch.randn(*delta.down.shape, generator=rng) @ root_II
        noise = (noise.T if delta.transposed else noise).to(delta.down_parameter)
        aimed = {delta.down_parameter: delta.down_parameter.data + noise}
        tensors.update(_of_energy(delta, aimed, energy_of, total_II))
    return Edit(name, "random", energy_of.changes, tensors)


def _of_energy(
    delta: Delta, aimed: Mapping[nn.Parameter, Tensor], other: Edit, total_II: Tensor
) -> Mapping[nn.Parameter, Tensor]:
    """What `aimed` does to one map, brought to the energy of what `other` does to it."""
    ((parameter, value),) = aimed.items()
    now = parameter.data
    ratio = _energy(delta, other.tensors[parameter], total_II) / max(_energy(delta, value, total_II), 1e-30)
    return {parameter: now + ratio * (value - now)}


def _energy(delta: Delta, value: Tensor, total_II: Tensor) -> float:
    """Root of the squared change of a map's output, summed over the text of these moments, when its parameter becomes `value`."""
    change = value.double() - delta.down_parameter.data.double()
    change = change.T if delta.transposed else change
    moved = change @ total_II.to(change)
    if delta.up is None:
        return float((moved * change).sum().clamp_min(0).sqrt())
    up = delta.up.double()
    return float(((moved @ change.T) * (up.T @ up)).sum().clamp_min(0).sqrt())


def scaling(pair: Pair, strength: float) -> Edit:
    """Plain adapter scaling: a share `strength` (0..1) of the whole tune is taken out, whatever it does.

    Of everything tuning touched, norms, embeddings and the unembedding too; at 1 the weights are base's.
    """
    tensors: dict[nn.Parameter, Tensor] = {
        delta.down_parameter: delta.down * (1 - strength) for delta in pair.deltas() if delta.up is not None
    }
    for parameter, base in counterparts(pair.base, pair.tuned):
        now, rows = parameter.data, min(len(base), len(parameter))  # tokens that tuning added keep their rows
        if not torch.equal(now[:rows], base[:rows]):
            value = now.clone()
            value[:rows] = (1 - strength) * now[:rows] + strength * base[:rows].to(now)
            tensors[parameter] = value
    return Edit(f"scale {1 - strength:g}", "scale", (), tensors)
