"""What fine-tuning changed, parameter by parameter: LoRA factors, or differences between two models' values.

A parameter is a linear map, a stack of maps (experts), a table of rows (embeddings, convolutions), or a vector (norms,
biases). Every one of them has a random counterpart of its own norm, so that random fine-tunes cover whatever differs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tunediff.core.chance import generator
from tunediff.core.errors import PairError, SourceError
from tunediff.models.maps import Layout
from tunediff.models.network import LanguageModel
from tunediff.models.vocabulary import IN_PLACE

MERGE = "merge the adapter (merge_and_unload) and give the merged folder as TUNED"
"""Advice for an adapter of a kind that cannot be compared as an adapter."""

MAP, EXPERTS, EMBEDDING, VECTOR, TABLE = KINDS = ("linear maps", "experts", "embeddings", "vectors", "other tables")
"""What a parameter is: a map, a stack of maps, rows that are looked up, a norm or bias, or anything else (convolutions)."""

RANK = 16
"""Largest rank of a random change of a map or a table."""

Through = Callable[[Tensor], Tensor]
"""A linear function of a map's inputs, applied to the rows of what was added to it: (any, in) to (any, in)."""


@dataclass(frozen=True, eq=False)
class Delta(ABC):
    """What fine-tuning changed in one parameter.

    name        the parameter's name, without ``.weight``: within the blocks where it is in one, else in the network
    kind        what it is, one of `KINDS`
    reader      the module whose calls show what the parameter's maps read, None where none does
    seen_as     the parameter's name within `reader`
    parameter   what tuned holds; for a LoRA, the adapter's A
    layout      how it keeps linear maps, None where it is none
    base        the value under which nothing was added, None for zeros
    """

    name: str
    kind: str
    reader: nn.Module | None
    seen_as: str
    parameter: nn.Parameter
    layout: Layout | None
    base: Tensor | None

    @property
    def maps(self) -> tuple[str, ...]:
        """The names of the linear maps in it; empty for a table or a vector."""
        if self.layout is None:
            return ()
        return tuple(f"{self.name}/{number}" for number in range(self.layout.stack)) or (self.name,)

    @property
    def up(self) -> Tensor | None:
        """For a LoRA, the map (out, r) behind its A, with the scale; None elsewhere."""
        return None

    def values(self, value: Tensor) -> list[Tensor]:
        """The maps (out, in), for a LoRA (r, in), in a value of the parameter, as views; what is no map counts as one."""
        return (self.layout or Layout()).maps(value)

    def added(self, number: int = 0, value: Tensor | None = None) -> Tensor:
        """What was added to the map of this number, float64 (out, in); for a LoRA (r, in), before `up`.

        value   another value of the parameter than tuned's
        """
        now = self.values(self.parameter.data if value is None else value)[number].double()
        return now if self.base is None else now - self.values(self.base)[number].double()

    def with_inputs(self, *through: Through | None) -> Mapping[nn.Parameter, Tensor]:
        """Return parameter values under which each map adds to base's what it added, behind a function of its inputs.

        through   for each map, or one for all; None leaves a map as tuned has it
        The identity gives tuned's weights to the bit, zeros give base's: the difference is taken in float64.
        """
        value = self.parameter.data.clone()
        into, before = self.values(value), None if self.base is None else self.values(self.base)
        for number, function in enumerate(through * len(into) if len(through) == 1 else through):
            if function is not None:
                map_OI = function(self.added(number))
                into[number].copy_(map_OI if before is None else before[number].double() + map_OI)
        return {self.parameter: value}

    def without(self, share: float) -> Mapping[nn.Parameter, Tensor]:
        """Return parameter values under which a share (0..1) of what was added is gone; 1 gives base's to the bit."""
        left = (1 - share) * self.parameter.data
        return {self.parameter: left if self.base is None else left + share * self.base.to(left)}

    @property
    @abstractmethod
    def norm(self) -> float:
        """Frobenius norm of what was added."""

    @property
    @abstractmethod
    def relative(self) -> float:
        """Squared norm of what was added, as a share of that and base's own squared norm (0..1)."""

    @abstractmethod
    def random(self, seed: int) -> Mapping[nn.Parameter, Tensor]:
        """Return parameter values under which a random change of the same norm was added.

        Each map gets a Gaussian change of the same rank (at most 16) in its own norm. In tables, each row that moved gets a
        random direction and keeps its norm. In vectors, the entries' changes trade places and get random signs.
        """

    @abstractmethod
    def permuted(self, seed: int) -> Mapping[nn.Parameter, Tensor]:
        """Return parameter values under which the same was added with its axes permuted, which keeps singular values."""


@dataclass(frozen=True, eq=False)
class LowRank(Delta):
    """What a LoRA adds to one linear map: ``up @ down`` of shape (out, in).

    up_parameter, scale   the adapter's B and the factor on it
    weight                the weight beside which the adapter stands
    """

    up_parameter: nn.Parameter
    scale: float
    weight: Tensor

    @property
    def up(self) -> Tensor:
        return self.up_parameter.data * self.scale

    @property
    def norm(self) -> float:
        return _norm_of_product(self.up, self.parameter.data)

    @property
    def relative(self) -> float:
        return _relative(self.norm, self.weight)

    def random(self, seed: int) -> Mapping[nn.Parameter, Tensor]:
        now = self.up
        rank, inputs = self.parameter.shape
        up, down = _low_rank(seed, self.name, len(now), inputs, rank, self.parameter.data)
        ratio = float(self.up_parameter.data.norm() / now.norm().clamp_min(1e-30))  # undo the adapter's own scale
        return {self.parameter: down * (self.norm / _norm_of_product(up, down)), self.up_parameter: up * ratio}

    def permuted(self, seed: int) -> Mapping[nn.Parameter, Tensor]:
        rng = generator(seed, "permuted adapter", self.name)
        down, up = self.parameter.data, self.up_parameter.data
        return {
            self.parameter: down[:, torch.randperm(down.shape[1], generator=rng)],
            self.up_parameter: up[torch.randperm(up.shape[0], generator=rng)],
        }


@dataclass(frozen=True, eq=False)
class Whole(Delta):
    """The difference between both models' values of one parameter, of any shape."""

    base: Tensor

    @property
    def norm(self) -> float:
        return float((self.parameter.data.float() - self.base.float()).double().norm())

    @property
    def relative(self) -> float:
        return _relative(self.norm, self.base)

    def random(self, seed: int) -> Mapping[nn.Parameter, Tensor]:
        if self.layout is not None:
            return self._changed(seed, _random_map)
        return self._changed(seed, _random_rows if self.parameter.squeeze().dim() > 1 else _random_vector)

    def permuted(self, seed: int) -> Mapping[nn.Parameter, Tensor]:
        return self._changed(seed, _permuted)

    def _changed(self, seed: int, change: Callable[[int, str, Tensor], Tensor]) -> Mapping[nn.Parameter, Tensor]:
        """Parameter values under which what was added is what `change` makes of seed, name and difference (float32)."""
        value = self.parameter.data.clone()
        for name, now, then in zip(self.maps or (self.name,), self.values(value), self.values(self.base)):
            now.copy_(then.double() + change(seed, name, now.float() - then.float()))
        return {self.parameter: value}


def _random_map(seed: int, name: str, difference_OI: Tensor) -> Tensor:
    shape = difference_OI.shape
    up, down = _low_rank(seed, name, shape[0], shape[1], min(RANK, *shape), difference_OI)
    return (up.double() @ down.double()) * (float(difference_OI.double().norm()) / _norm_of_product(up, down))


def _random_rows(seed: int, name: str, difference: Tensor) -> Tensor:
    """A table's change with rows of random directions, which lie in few dimensions as a random map's outputs do."""
    rows = difference.flatten(1).double()
    rank, rng = min(RANK, *rows.shape), generator(seed, "random rows", name)
    among = torch.randn(rank, rows.shape[1], generator=rng).to(rows)
    moved = rows.norm(dim=1) > 0
    drawn = torch.randn(len(rows), rank, generator=rng).to(rows)[moved] @ among
    added = torch.zeros_like(rows)
    added[moved] = drawn * (rows[moved].norm(dim=1) / drawn.norm(dim=1))[:, None]
    return added.view_as(difference)


def _random_vector(seed: int, name: str, difference: Tensor) -> Tensor:
    rng = generator(seed, "random vector", name)
    order = torch.randperm(difference.numel(), generator=rng).to(difference.device)
    signs = torch.randint(0, 2, (difference.numel(),), generator=rng).to(difference) * 2 - 1
    return (difference.flatten()[order] * signs).double().view_as(difference)


def _permuted(seed: int, name: str, difference: Tensor) -> Tensor:
    rng = generator(seed, "permuted adapter", name)
    for axis in reversed(range(difference.dim())):
        order = torch.randperm(difference.shape[axis], generator=rng).to(difference.device)
        difference = difference.index_select(axis, order)
    return difference.double()


def _low_rank(seed: int, name: str, outputs: int, inputs: int, rank: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Gaussian factors (outputs, rank) and (rank, inputs) of the dtype and on the device of `like`."""
    rng = generator(seed, "random lora", name)
    return torch.randn(outputs, rank, generator=rng).to(like), torch.randn(rank, inputs, generator=rng).to(like)


def _norm_of_product(up: Tensor, down: Tensor) -> float:
    """|UD|, as <U'U, DD'>, without forming the product."""
    up, down = up.double(), down.double()
    return float(((up.T @ up) * (down @ down.T)).sum().clamp_min(0).sqrt())


def _relative(norm: float, weight: Tensor) -> float:
    own = float(weight.double().square().sum())
    return norm**2 / (norm**2 + own) if norm else 0.0


def lora_deltas(module: Any) -> Iterator[LowRank]:
    """Yield the LoRA layers of a PEFT model with one active plain LoRA adapter; other kinds raise `SourceError`."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    if module.active_peft_config.peft_type != "LORA":
        raise SourceError(
            f"the adapter is of kind {str(module.active_peft_config.peft_type.value)}",
            expected="plain LoRA",
            remedy=MERGE,
        )
    for name, layer in module.named_modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        active = layer.active_adapters
        if not isinstance(layer, LoraLayer) or len(active) != 1 or active[0] not in layer.lora_A:
            raise SourceError(
                f"{name} is not a plain LoRA layer",
                expected="one LoRA adapter on linear maps",
                got=type(layer).__name__,
                remedy=MERGE,
            )
        adapter = active[0]
        down, up = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        variant = layer.lora_variant.get(adapter)  # DoRA and its like
        if variant is not None or layer.lora_bias.get(adapter):
            raise SourceError(
                f"{name} uses {type(variant).__name__ if variant else 'a LoRA bias'}",
                expected="plain LoRA",
                remedy=MERGE,
            )
        weight = layer.get_base_layer().weight.data
        yield LowRank(name, MAP, layer, "weight", down, Layout(), None, up, layer.scaling[adapter], weight)


def saved_deltas(tuned: LanguageModel) -> Iterator[Whole]:
    """Yield the parameters of modules that a PEFT adapter replaces whole (``modules_to_save``), where they differ."""
    from peft.utils.other import ModulesToSaveWrapper

    for name, wrapper in tuned.module.named_modules():
        if isinstance(wrapper, ModulesToSaveWrapper):
            saved = wrapper.modules_to_save[wrapper.active_adapter]
            yield from _differing(_named(wrapper.original_module), _named(saved), f"{name}.", _roles(tuned, saved))


def full_deltas(base: LanguageModel, tuned: LanguageModel) -> Iterator[Whole]:
    """Yield the parameters that differ between two whole models, buffers that are saved with them included."""
    inside = [{n: tuple(p.shape) for n, p in _named(m.blocks).items() if p.dim() > 1} for m in (base, tuned)]
    if inside[0] != inside[1]:
        name = min(set(inside[0].items()) ^ set(inside[1].items()))[0]
        raise PairError(
            f"the blocks of {base.name} and {tuned.name} are built differently",
            expected=f"{name} of shape {inside[0].get(name, 'none')} (base)",
            got=f"{inside[1].get(name, 'none')} (tuned)",
            remedy="give the model that tuned was made from as BASE",
        )
    yield from _differing(*_both(base, tuned), "", _roles(tuned, tuned.network))


def unmatched(base: LanguageModel, tuned: LanguageModel) -> list[str]:
    """The names of what only one of two whole models has, or has in another shape, and is not all zeros.

    Random fine-tunes leave it as tuned has it.
    """
    theirs, mine = _both(base, tuned)
    alone = {name for name in {*theirs, *mine} if not _alike(theirs.get(name), mine.get(name))}
    return sorted(name for name in alone if any(bool(side[name].any()) for side in (theirs, mine) if name in side))


def _alike(theirs: Tensor | None, mine: Tensor | None) -> bool:
    return theirs is not None and mine is not None and theirs.shape == mine.shape


def _both(base: LanguageModel, tuned: LanguageModel) -> tuple[dict[str, Any], dict[str, Any]]:
    """Both models' values by name: rows of tokens in tuned's order, and tuned's own where base lacks the token."""
    theirs, mine = (_named(model.network, model.blocks) for model in (base, tuned))
    ends = (tuned.network.get_input_embeddings(), tuned.family.unembedding(tuned.network))
    by_token = {id(parameter) for end in ends for parameter in end.parameters()}
    for name, now in mine.items():
        before = theirs.get(name)
        in_place = base.numbering is tuned.numbering is IN_PLACE and _alike(before, now)
        if in_place or id(now) not in by_token or before is None or before.shape[1:] != now.shape[1:]:
            continue
        number_I = tuned.numbering.numbers(torch.arange(len(now), device=now.device))
        known_I = base.numbering.knows(number_I, len(before))
        theirs[name] = now.data.clone()
        theirs[name][known_I] = before.data[base.numbering.ids(number_I[known_I])].to(now.dtype)
    return theirs, mine


def _named(module: nn.Module, blocks: nn.Module | None = None) -> dict[str, Any]:
    """Parameters and saved buffers of floating numbers, tied ones under each of their names; those in a block by their
    names within the blocks.
    """
    within = {} if blocks is None else {id(value): name for name, value in blocks.state_dict(keep_vars=True).items()}
    values = module.state_dict(keep_vars=True).items()
    return {within.get(id(value), name): value for name, value in values if value.is_floating_point()}


@dataclass(frozen=True, eq=False)
class _Role:
    """What a parameter is in its network: fields as of `Delta`."""

    kind: str
    reader: nn.Module | None = None
    seen_as: str = ""
    layout: Layout | None = None


def _roles(model: LanguageModel, part: nn.Module) -> dict[int, _Role]:
    """The roles of the tables and linear maps within a part of a network, by parameter.

    An embedding that is the unembedding too is no map: a token's row is looked up, whatever takes its place.
    """
    found: dict[int, _Role] = {}
    for module in part.modules():
        for name, layout in model.family.maps(module).items():
            kind = EXPERTS if layout.stack else MAP
            found[id(module.get_parameter(name))] = _Role(kind, module, name, layout)
    tables = (module for module in part.modules() if isinstance(module, nn.Embedding))
    return found | {id(table.weight): _Role(EMBEDDING) for table in tables}


def _differing(
    theirs: Mapping[str, Any], mine: Mapping[str, Any], prefix: str, roles: Mapping[int, _Role]
) -> Iterator[Whole]:
    seen: set[int] = set()
    for name, parameter in mine.items():
        if id(parameter) in seen or not _alike(theirs.get(name), parameter):
            continue
        seen.add(id(parameter))
        base, now = theirs[name].data, parameter.data
        if not torch.equal(base, now):
            role = roles.get(id(parameter)) or _Role(TABLE if now.squeeze().dim() > 1 else VECTOR)
            own = (prefix + name).removesuffix(".weight")
            yield Whole(own, role.kind, role.reader, role.seen_as, parameter, role.layout, base)
