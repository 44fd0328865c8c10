"""Reverting: take chosen changes out of a fine-tuned model by giving base's maps back where the changes are on.

Only what fine-tuning added is touched, so base stays as it is and a baked edit equals the live one. Every linear map
W + D that fine-tuning touched becomes W + D M. M is such that inputs where the changes are on get base's map W back,
and inputs elsewhere keep the tuned map W + D. An expert's inputs are those of the tokens routed to it. What is no linear
map (norms, biases, embeddings, convolutions) stays as tuned has it, and so does a map whose inputs nobody can see.

M is a least-squares solution. With C1 and C0 the second moments of a map's inputs on and off the changes, D' = D M
minimizes strength |D' x|^2 on C1 + |(D' - D) x|^2 on C0 + ridge |D' - D|^2, so
M = (C0 + ridge) (C0 + strength C1 + ridge)^-1.

Related: MEMIT's closed form (Meng et al. 2023, 2210.07229) and AlphaEdit's kept set (Fang et al. 2025, 2410.02355). They
insert facts; here the target is base's own map, so nothing is inserted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tunediff.core.chance import generator
from tunediff.core.errors import NumericsError
from tunediff.edits.edit import Edit, EditSettings
from tunediff.models.deltas import Delta, Through
from tunediff.models.maps import Seen
from tunediff.models.network import LanguageModel
from tunediff.models.pair import Pair
from tunediff.models.passes import Watch
from tunediff.texts.tokens import Tokens


@dataclass(frozen=True, eq=False)
class Moments:
    """Second moments (I, I) of one linear map's inputs: summed over tokens where the changes are on, and elsewhere."""

    on_II: Tensor
    off_II: Tensor


@dataclass(frozen=True, eq=False)
class FewInputs:
    """The inputs (N, I) of a map that read few tokens, and how much each counts as on and as off; sums are made on demand."""

    x_NI: Tensor
    on_N: Tensor
    off_N: Tensor

    @property
    def on_II(self) -> Tensor:
        return (self.x_NI * self.on_N[:, None]).T @ self.x_NI

    @property
    def off_II(self) -> Tensor:
        return (self.x_NI * self.off_N[:, None]).T @ self.x_NI


Inputs = Moments | FewInputs
"""What an edit of one map is computed from."""


def input_moments(
    model: LanguageModel,
    deltas: Sequence[Delta],
    tokens: Tokens,
    on_CR: Sequence[Sequence[Tensor]],
    batch_tokens: int = 2048,
) -> list[dict[str, Inputs]]:
    """Moments of every map's inputs over `tokens`, by map name, for each of C masks of where changes are on.

    Maps that read nothing, or whose inputs' positions nobody knows, are left out.

    on_CR   for each mask and row, how much each of the row's tokens counts as on (0..1), shape (T of the row,)
    """
    wanted: dict[nn.Module, dict[str, Delta]] = {}
    for delta in deltas:
        if delta.reader is not None:
            wanted.setdefault(delta.reader, {})[delta.seen_as] = delta
    ways = len(on_CR)
    sums: dict[str, _Sum] = {}
    # Maps that read the very same tensor (query, key, value) share their products.
    last: list[tuple[Tensor, Tensor | None, str]] = []
    reads: dict[str, str] = {}
    elsewhere: set[str] = set()
    cells: list[Any] = [None, []]

    def see(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any], weight_CP: Tensor) -> None:
        if cells[0] is not weight_CP:
            cells[:] = [weight_CP, _cells(weight_CP)]
        mine = wanted[module]
        adapter = any(delta.up is not None for delta in mine.values())
        for seen in [Seen("weight", given[0])] if adapter else model.family.reads(module, given, named):
            if seen.name not in mine:
                continue
            delta = mine[seen.name]
            name = delta.maps[seen.number]
            if last and last[0][0] is seen.x_NI and last[0][1] is seen.at_N:
                reads[name] = last[0][2]
                continue
            last[:] = [(seen.x_NI, seen.at_N, name)]
            x_NI = seen.x_NI.flatten(0, -2)
            if len(x_NI) != (weight_CP.shape[1] if seen.at_N is None else len(seen.at_N)):
                elsewhere.add(name)  # rows that nobody says the positions of
                continue
            if name not in sums:
                sums[name] = _Sum(ways, x_NI.shape[1], len(delta.maps) > 1)
            sums[name].add(x_NI, seen.at_N, weight_CP, cells[1])

    for batch in tokens.batches(batch_tokens):
        weight_BTC = torch.zeros(*batch.mask_BT.shape, ways + 1)
        weight_BTC[..., ways] = batch.mask_BT.float()
        for c, on_R in enumerate(on_CR):
            for b, row in enumerate(batch.rows_B.tolist()):
                weight_BTC[b, : len(on_R[row]), c] = on_R[row]
        last.clear()
        model.read(batch.ids_BT, (), True, wanted_BT=batch.mask_BT, watch=Watch(list(wanted), weight_BTC, see))
    # Maps that share their inputs get the very same object, so that their M is solved for once.
    shared = [{name: s.moments(c) for name, s in sums.items() if name not in elsewhere} for c in range(ways)]
    names = [name for delta in deltas for name in delta.maps]
    return [{name: ms[reads.get(name, name)] for name in names if reads.get(name, name) in ms} for ms in shared]


class _Sum:
    """What one map read so far, for each of C masks.

    A map of a stack reads few tokens, and there are many of them: its inputs are kept as they are while they take less room
    than their products.
    """

    def __init__(self, ways: int, inputs: int, few: bool):
        self.ways, self.inputs = ways, inputs
        self.rows: list[tuple[Tensor, Tensor]] | None = [] if few else None
        self.sum_CSII: Tensor | None = None

    def add(self, x_PI: Tensor, at_N: Tensor | None, weight_CP: Tensor, cells: list[tuple[list[int], Tensor]]) -> None:
        """Add inputs at some positions, with the masks' weights at all positions."""
        at_N = None if at_N is None else at_N.to(weight_CP.device)
        if self.rows is not None:
            weight_CN = weight_CP if at_N is None else weight_CP[:, at_N]
            some = weight_CN[-1] > 0
            self.rows.append((x_PI[some.to(x_PI.device)].float(), weight_CN[:, some]))
            if sum(len(x_NI) for x_NI, _ in self.rows) > self.inputs:
                kept, self.rows = self.rows, None
                for x_NI, weight_CN in kept:
                    self.add(x_NI, None, weight_CN, _cells(weight_CN))
            return
        if self.sum_CSII is None:
            self.sum_CSII = torch.zeros(self.ways, 2, self.inputs, self.inputs, device=x_PI.device)
        for which, mass_P in cells:
            mass_N = mass_P if at_N is None else mass_P[at_N]
            some = (mass_N > 0).to(x_PI.device)
            x = x_PI[some].float() * mass_N.to(x_PI.device)[some, None].sqrt()
            product_II = x.T @ x
            # Off is summed too: all minus on would not be definite where a change is on everywhere.
            for c in range(self.ways):
                self.sum_CSII[c, int(c not in which)] += product_II

    def moments(self, way: int) -> Inputs:
        """The moments for one mask."""
        if self.sum_CSII is not None:
            return Moments(*self.sum_CSII[way])
        x_NI = torch.cat([x_NI for x_NI, _ in self.rows or []])
        weight_CN = torch.cat([weight_CN for _, weight_CN in self.rows or []], 1).to(x_NI)
        return FewInputs(x_NI, weight_CN[way], weight_CN[-1] - weight_CN[way])


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


def revert_map(moments: Inputs, settings: EditSettings) -> Through:
    """The function that takes a map D (O, I) to D M in float64, with M as in the module's docstring.

    Text on and off the changes is brought to equal mass first. M itself is never formed: there is one factorization,
    and as many solutions as D has rows (for a LoRA, its rank). Raises `NumericsError` for moments that are not finite.
    """
    on_II, off_II = moments.on_II, moments.off_II
    mass_on, mass_off = (m.diagonal().double().sum() for m in (on_II, off_II))
    if not mass_on > 0:
        return lambda map_OI: map_OI.double()
    # In place where it can be: these are as large as a map's inputs are wide, squared.
    on, kept = on_II.double().div_(mass_on), off_II.double().div_(mass_off.clamp_min(1e-30))
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
    moments: Mapping[str, Inputs],
    settings: EditSettings | None = None,
    energy_of: Edit | None = None,
) -> Edit:
    """The edit that gives base's maps back where the changes are on, with default settings if none are given.

    moments     second moments of maps' inputs, by map name (`input_moments`); a map without any stays as tuned has it
    energy_of   for a fair control: scale the edit so that it takes as much energy out of every map's output on this text
                as the given edit does
    """
    tensors: dict[nn.Parameter, Tensor] = {}
    other = None if energy_of is None else energy_of.parameters(pair.tuned)
    maps: dict[int, Through] = {}  # maps that share their inputs follow one another
    for delta, known in _known(pair, moments):
        through: list[Through | None] = [None] * len(delta.maps)
        for number, found in known.items():
            if id(found) not in maps:
                maps.clear()  # before the next ones are made, which are as large
                maps[id(found)] = revert_map(found, settings or EditSettings())
            through[number] = maps[id(found)]
        mine = delta.with_inputs(*through)
        if other is not None:
            for number, found in known.items():
                _set_energy(delta, number, mine[delta.parameter], other[delta.parameter], found.on_II + found.off_II)
        tensors.update(mine)
    return Edit.of(pair, name, "revert", changes, tensors)


def _known(pair: Pair, moments: Mapping[str, Inputs]) -> Iterator[tuple[Delta, dict[int, Inputs]]]:
    """What tuning changed in parameters with maps whose inputs are known, with these inputs by the maps' numbers."""
    for delta in pair.deltas():
        known = {number: moments[name] for number, name in enumerate(delta.maps) if name in moments}
        if known:
            yield delta, known


def random_directions(pair: Pair, name: str, moments: Mapping[str, Inputs], energy_of: Edit, seed: int) -> Edit:
    """A control edit that takes random directions from every map's inputs.

    The directions are drawn from the covariance of the text, so that inputs vary along them. Their energy in every map's
    output on this text equals that of `energy_of`.
    """
    tensors: dict[nn.Parameter, Tensor] = {}
    other = energy_of.parameters(pair.tuned)
    roots: dict[int, tuple[Tensor, Tensor]] = {}
    for delta, known in _known(pair, moments):
        aimed = delta.parameter.data.clone()
        for number, found in known.items():
            if id(found) not in roots:
                roots.clear()
                total_II = found.on_II + found.off_II
                # Of the trace, which no eigenvalue exceeds: sums of float32 products are only so definite. It may be 0: inputs, too.
                ridge = (1e-5 * total_II.diagonal().sum()).clamp_min(1e-30) * torch.eye(len(total_II))
                roots[id(found)] = total_II, torch.linalg.cholesky(total_II.double() + ridge).T.float()
            total_II, root_II = roots[id(found)]
            rng = generator(seed, "random directions", name, delta.maps[number])
            into = delta.values(aimed)[number]
            into += (torch.randn(*into.shape, generator=rng) @ root_II).to(into)
            _set_energy(delta, number, aimed, other[delta.parameter], total_II)
        tensors[delta.parameter] = aimed
    return Edit.of(pair, name, "random", energy_of.changes, tensors)


def _set_energy(delta: Delta, number: int, aimed: Tensor, other: Tensor, total_II: Tensor) -> None:
    """Scale the edit of one map, in the parameter's value `aimed`, to the energy of the edit of it in `other`."""
    ratio = _energy(delta, number, other, total_II) / max(_energy(delta, number, aimed, total_II), 1e-30)
    now, into = delta.values(delta.parameter.data)[number], delta.values(aimed)[number]
    into.copy_(now + ratio * (into - now))


def _energy(delta: Delta, number: int, value: Tensor, total_II: Tensor) -> float:
    """Root of the summed squared change of a map's output over the text of these moments, when its parameter is `value`."""
    change = delta.values(value)[number].double() - delta.values(delta.parameter.data)[number].double()
    moved = change @ total_II.to(change)
    if delta.up is None:
        return float((moved * change).sum().clamp_min(0).sqrt())
    up = delta.up.double()
    return float(((moved @ change.T) * (up.T @ up)).sum().clamp_min(0).sqrt())
