"""Relations: how tuned's weights relate to base's, measured in one pass over both, and a look at a few differences' ranks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tunediff.core.artifacts import plain
from tunediff.core.chance import generator
from tunediff.models.adapters import peft_layers
from tunediff.models.fingerprints import function_of
from tunediff.models.network import LanguageModel
from tunediff.records.relation import ConfigDifference, Relation

FOREIGN_COSINE = 0.1
"""Median cosine of weight matrices below which tuned does not come from base (docs/models.md has what pairs measure)."""
LIGHT = 0.05
"""Distance, relative to the norm of base's weights, up to which a fine-tune is light."""
EXAMINED = 12
"""Most differing matrices whose ranks are examined."""
LARGEST_RANK = 64
"""Largest rank that counts as low; in small matrices a quarter of the smaller side."""
EXPLAINED = 0.99
"""Share of a difference's square that a low rank has to explain, besides what rounding adds."""
COPIES = (torch.bfloat16, torch.float16)
"""Precisions to which a copy may have been rounded."""


@dataclass
class _Sums:
    """What one pass over both models' weights adds up."""

    base: float = 0.0
    difference: float = 0.0
    equal: int = 0
    numbers: int = 0
    parameters: int = 0
    cosines: list[float] = field(default_factory=list)
    changed: int = 0
    # Precision, and whether tuned is base rounded (else base is tuned rounded): what still holds for every parameter.
    rounded: set[tuple[torch.dtype, bool]] = field(
        default_factory=lambda: {(d, s) for d in COPIES for s in (True, False)}
    )

    def add(self, base: Tensor, tuned: Tensor) -> bool:
        """Add one parameter's values in both models, of the same shape; return whether it is a matrix that differs."""
        self.parameters += 1
        self.numbers += base.numel()
        size = float(base.double().norm() if base.numel() < 1 << 16 else base.float().norm()) ** 2
        self.base += size
        matrix = base.dim() > 1 and size > 0
        if tuned.data_ptr() == base.data_ptr() or torch.equal(base, tuned):
            self.equal += base.numel()
            self.cosines += [1.0] if matrix else []
            return False
        apart = float((tuned.float() - base.float()).norm()) ** 2
        self.difference += apart
        self.equal += int((base == tuned).sum())
        self.rounded = {(dtype, ahead) for dtype, ahead in self.rounded if _is_rounded(base, tuned, dtype, ahead)}
        theirs = float(tuned.float().norm()) ** 2
        if matrix:
            self.cosines += [(size + theirs - apart) / 2 / (size * theirs) ** 0.5] if theirs > 0 else []
        self.changed += matrix
        return matrix


def relation(base: LanguageModel, tuned: LanguageModel, adapter: bool, notes: list[str]) -> Relation:
    """Measure how tuned relates to base.

    adapter  whether tuned is known to be an adapter over base, in base's own module or merged into a copy
    notes    what else was noticed of the two, in sentences

    The kind is read off these numbers; it says what weights look like, not what anybody did. Two networks trained from
    different starts have no cosine at equal places (Zhu et al. 2025, 2502.12292, test for that more finely).
    """
    sums, alone, whole = _Sums(), [0, 0], [0, 0]
    switched = base.network is tuned.network
    changed: list[tuple[str, Tensor, Tensor]] = []
    for name, mine, theirs in _parameters(base, tuned):
        for side, values in enumerate((mine, theirs)):
            whole[side] += values.numel() if values is not None else 0
        if mine is not None and theirs is not None and mine.shape[1:] == theirs.shape[1:] and mine.dim():
            rows = min(len(mine), len(theirs))
            if sums.add(mine[:rows], theirs[:rows]) and not switched:
                changed.append((name, mine[:rows], theirs[:rows]))
        else:
            alone[0] += mine is not None
            alone[1] += theirs is not None
    ranks = _lora_ranks(base.network) if switched else _ranks(changed)
    cosine = float(torch.tensor(sums.cosines).median()) if sums.cosines else None
    distance = (sums.difference / sums.base) ** 0.5 if sums.base else 0.0
    if adapter:
        kind = "adapter"
    elif 2 * sums.numbers < max(whole):
        kind = "unrelated"
    elif sums.equal == sums.numbers:
        kind = "same weights"
    elif sums.rounded:
        kind = "rounded copy"
    elif cosine is not None and cosine < FOREIGN_COSINE:
        kind = "other ancestor"
    elif ranks and None not in ranks:
        kind = "merged adapter"
    else:
        kind = "light tune" if distance <= LIGHT else "heavy tune"
    return Relation(
        kind,
        sums.equal / max(1, sums.numbers),
        distance,
        cosine,
        max((r for r in ranks if r is not None), default=0) if ranks and None not in ranks else None,
        len(ranks),
        sums.changed,
        sums.parameters,
        alone[0],
        alone[1],
        config_differences(base.network, tuned.network),
        notes,
    )


def config_differences(base: nn.Module, tuned: nn.Module) -> list[ConfigDifference]:
    """The fields in which two networks' configurations differ, of those that can change what a network computes."""
    ours, theirs = function_of(base), function_of(tuned)
    named = [(name, ours.get(name), theirs.get(name)) for name in sorted(ours.keys() | theirs.keys())]
    told = [ConfigDifference(n, *(json.dumps(plain(v), ensure_ascii=False)[:200] for v in vs)) for n, *vs in named]
    return [one for one in told if one.base != one.tuned]


def _parameters(base: LanguageModel, tuned: LanguageModel) -> Iterator[tuple[str, Tensor | None, Tensor | None]]:
    """Every parameter by its name in base, with its values in both models; None where a model has none."""
    if base.network is tuned.network:
        yield from _switched(base.network)
        return
    mine, theirs = (dict(side.network.named_parameters()) for side in (base, tuned))
    for name in dict.fromkeys([*mine, *theirs]):
        ours, other = (side[name].data if name in side else None for side in (mine, theirs))
        yield name, ours, other


def _switched(network: nn.Module) -> Iterator[tuple[str, Tensor, Tensor]]:
    """The parameters of a network with a plain LoRA: what an adapted map computes with, off and on."""
    adapted, whole = peft_layers()
    seen: set[int] = set()

    def once(name: str, base: nn.Parameter, tuned: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
        if id(base) not in seen:
            seen.add(id(base))
            yield name, base.data.to(tuned), tuned

    layers: list[tuple[str, Any]] = list(network.named_modules())
    for name, layer in layers:
        if isinstance(layer, adapted):
            weight = layer.base_layer.weight
            (active,) = layer.active_adapters
            seen.discard(id(weight))  # tied to another that stays as it is: it counts here
            added = layer.get_delta_weight(active).float()
            yield from once(f"{name}.weight", weight, weight.data.float() + added)
        elif isinstance(layer, whole):
            active = dict(layer.modules_to_save[layer.active_adapter].named_parameters())
            for part, weight in layer.original_module.named_parameters():
                yield from once(f"{name}.{part}", weight, active[part].data)
    for name, parameter in network.named_parameters():
        if ".lora_" not in name and ".modules_to_save." not in name:
            yield from once(name, parameter, parameter.data)


def _lora_ranks(network: nn.Module) -> list[int | None]:
    """The rank of every map of a plain LoRA."""
    adapted, _ = peft_layers()
    layers: list[Any] = [layer for layer in network.modules() if isinstance(layer, adapted)]
    return [layer.r[active] for layer in layers for active in layer.active_adapters]


def _is_rounded(base: Tensor, tuned: Tensor, dtype: torch.dtype, ahead: bool) -> bool:
    fine, coarse = (base, tuned) if ahead else (tuned, base)
    return torch.equal(fine.to(dtype).to(coarse.dtype), coarse)


def _ranks(changed: list[tuple[str, Tensor, Tensor]]) -> list[int | None]:
    """The rank that explains `EXPLAINED` of each of up to `EXAMINED` differences; None where none up to the largest does.

    Found from the product with a few random vectors (Halko et al. 2011, 0909.4061).
    """
    flat = [(name, b.flatten(0, -2), t.flatten(0, -2)) for name, b, t in changed if min(b.flatten(0, -2).shape) >= 8]
    chosen = [flat[round(i * (len(flat) - 1) / max(1, EXAMINED - 1))] for i in range(EXAMINED)] if flat else []
    ranks: list[int | None] = []
    for name, base, tuned in {name: (name, base, tuned) for name, base, tuned in chosen}.values():
        difference = tuned.float() - base.float()
        most = min(LARGEST_RANK, min(difference.shape) // 4)
        draws = torch.randn(difference.shape[1], most + 8, generator=generator(0, "ranks", name)).to(difference)
        basis, _ = torch.linalg.qr(difference @ (difference.T @ (difference @ draws)))
        values = torch.linalg.svdvals(basis.T @ difference).double()[:most]
        whole, rounding = float(difference.double().norm()) ** 2, _rounding(base, tuned)
        enough = (values.square().cumsum(0) >= EXPLAINED * (whole - rounding)).nonzero()
        ranks.append(int(enough[0]) + 1 if whole > rounding and len(enough) else None)
    return ranks


def _rounding(base: Tensor, tuned: Tensor) -> float:
    """Expected square that rounding of one or both to bfloat16 added to a difference; 0 where tuned is finer than that."""
    coarse = [torch.equal(one.bfloat16().to(one.dtype), one) for one in (tuned, base)]
    if not coarse[0]:
        return 0.0
    step = torch.exp2(torch.frexp(tuned.float())[1].double() - 8)  # bfloat16 keeps eight bits
    return float(step.square().sum()) / 12 * sum(coarse)
