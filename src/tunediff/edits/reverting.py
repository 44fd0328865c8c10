"""Reverting: take chosen changes out of a fine-tuned model by giving base's maps back where the changes are on.

Only what fine-tuning added is touched, so base stays as it is and a baked edit equals the live one. Every linear map
W + D that fine-tuning touched becomes W + D M. M is such that inputs where the changes are on get base's map W back,
and inputs elsewhere keep the tuned map W + D.

M is a least-squares solution. With C1 and C0 the second moments of a map's inputs on and off the changes, D' = D M
minimizes strength |D' x|^2 on C1 + |(D' - D) x|^2 on C0 + ridge |D' - D|^2, so
M = (C0 + ridge) (C0 + strength C1 + ridge)^-1.

Related: MEMIT's closed form (Meng et al. 2023, 2210.07229) and AlphaEdit's kept set (Fang et al. 2025, 2410.02355). They
insert facts; here the target is base's own map, so nothing is inserted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tunediff.core.chance import generator
from tunediff.core.errors import NumericsError
from tunediff.edits.edit import Edit, EditSettings
from tunediff.models.deltas import Delta
from tunediff.models.network import LanguageModel
from tunediff.models.pair import Pair
from tunediff.models.passes import Watch
from tunediff.texts.tokens import Tokens


@dataclass(frozen=True, eq=False)
class Moments:
    """Second moments (I, I) of one linear map's inputs: summed over tokens where the changes are on, and elsewhere."""

    on_II: Tensor
    off_II: Tensor


def input_moments(
    model: LanguageModel,
    deltas: Sequence[Delta],
    tokens: Tokens,
    on_CR: Sequence[Sequence[Tensor]],
    batch_tokens: int = 2048,
) -> list[dict[str, Moments]]:
    """Moments of every map's inputs over `tokens`, by map name, for each of C masks of where changes are on.

    on_CR   for each mask and row, how much each of the row's tokens counts as on (0..1), shape (T of the row,)
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
            # Off is summed too: all minus on would not be definite where a change is on everywhere.
            for c in range(ways):
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
    """Masks as sets of masks that agree, and their common weight at each token (N,).

    Each token is then multiplied out about once, not once for each mask.
    """
    cells: dict[tuple[int, ...], Tensor] = {}
    levels_CN, order_CN = weight_CN.sort(0, descending=True)
    for c, step_N in enumerate(levels_CN - torch.cat([levels_CN[1:], torch.zeros_like(levels_CN[:1])])):
        sets_NC = order_CN[: c + 1].sort(0).values.T
        for which in torch.unique(sets_NC[step_N > 0], dim=0):
            cells.setdefault(tuple(which.tolist()), torch.zeros_like(step_N)).add_(step_N * (sets_NC == which).all(1))
    return [(list(which), mass_N) for which, mass_N in cells.items()]


def revert_map(moments: Moments, settings: EditSettings) -> Callable[[Tensor], Tensor]:
    """The function that takes a map D (O, I) to D M in float64, with M as in the module's docstring.

    Text on and off the changes is brought to equal mass first. M itself is never formed: there is one factorization,
    and as many solutions as D has rows (for a LoRA, its rank). Raises `NumericsError` for moments that are not finite.
    """
    mass_on, mass_off = (m.diagonal().double().sum() for m in (moments.on_II, moments.off_II))
    if not mass_on > 0:
        return lambda map_OI: map_OI.double()
    # In place where it can be: these are as large as a map's inputs are wide, squared.
    on, kept = moments.on_II.double().div_(mass_on), moments.off_II.double().div_(mass_off.clamp_min(1e-30))
    ridge, added = max(settings.ridge, 1e-9) / len(on), 0.0
    for _ in range(12):  # float32 sums need not be definite where changes are on nearly everywhere
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
    settings: EditSettings | None = None,
    energy_of: Edit | None = None,
) -> Edit:
    """The edit that gives base's maps back where the changes are on, with default settings if none are given.

    moments     second moments of every map's inputs, by map name (`input_moments`)
    energy_of   for a fair control: scale the edit so that it takes as much energy out of every map's output on this text
                as the given edit does
    """
    tensors: dict[nn.Parameter, Tensor] = {}
    other = None if energy_of is None else energy_of.parameters(pair.tuned)
    maps: dict[int, Callable[[Tensor], Tensor]] = {}  # maps that share their inputs follow one another
    for delta in pair.deltas():
        found = moments[delta.name]
        if id(found) not in maps:
            maps.clear()  # before the next ones are made, which are as large
            maps[id(found)] = revert_map(found, settings or EditSettings())
        mine = delta.with_inputs(maps[id(found)])
        if other is not None:
            mine = _of_energy(delta, mine, other, found.on_II + found.off_II)
        tensors.update(mine)
    return Edit.of(pair, name, "revert", changes, tensors)


def random_directions(pair: Pair, name: str, moments: Mapping[str, Moments], energy_of: Edit, seed: int) -> Edit:
    """A control edit that takes random directions from every map's inputs.

    The directions are drawn from the covariance of the text, so that inputs vary along them. Their energy in every map's
    output on this text equals that of `energy_of`.
    """
    tensors: dict[nn.Parameter, Tensor] = {}
    other = energy_of.parameters(pair.tuned)
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
        tensors.update(_of_energy(delta, aimed, other, total_II))
    return Edit.of(pair, name, "random", energy_of.changes, tensors)


def _of_energy(
    delta: Delta, aimed: Mapping[nn.Parameter, Tensor], other: Mapping[nn.Parameter, Tensor], total_II: Tensor
) -> Mapping[nn.Parameter, Tensor]:
    """The edit `aimed` of one map, scaled to the energy of the edit `other` of it."""
    ((parameter, value),) = aimed.items()
    now = parameter.data
    ratio = _energy(delta, other[parameter], total_II) / max(_energy(delta, value, total_II), 1e-30)
    return {parameter: now + ratio * (value - now)}


def _energy(delta: Delta, value: Tensor, total_II: Tensor) -> float:
    """Root of the summed squared change of a map's output over the text of these moments, when its parameter is `value`."""
    change = value.double() - delta.down_parameter.data.double()
    change = change.T if delta.transposed else change
    moved = change @ total_II.to(change)
    if delta.up is None:
        return float((moved * change).sum().clamp_min(0).sqrt())
    up = delta.up.double()
    return float(((moved @ change.T) * (up.T @ up)).sum().clamp_min(0).sqrt())
