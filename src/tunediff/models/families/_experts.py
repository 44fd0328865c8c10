"""Experts that a block keeps together in a few parameters: each way of keeping them, and what each expert's maps read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn.functional import linear

from tunediff.models.maps import Layout, Seen


@dataclass(frozen=True)
class Way:
    """One way of keeping experts.

    knows   whether a module keeps them so
    maps    the maps whose inputs its calls show, by their parameters' names within it
    reads   what these read in one call, from the module and its arguments in order
    """

    knows: Callable[[Any], bool]
    maps: Callable[[Any], Mapping[str, Layout]]
    reads: Callable[[Any, Sequence[Any]], Iterator[Seen]]


def way_of(module: Any) -> Way | None:
    """The way in which a module keeps experts, None where it keeps none."""
    return next((way for way in WAYS if way.knows(module)), None)


def _at(chosen_NK: Tensor, number: int) -> Tensor:
    """The positions from which an expert is chosen."""
    return (chosen_NK == number).any(-1).nonzero()[:, 0]


# transformers' interface: one stack before the activation, one behind it, and the choice of experts as an argument.


def _interface_maps(experts: Any) -> Mapping[str, Layout]:
    layout = Layout(experts.is_transposed, experts.down_proj.shape[0])
    return {"gate_up_proj" if experts.has_gate else "up_proj": layout, "down_proj": layout}


def _interface_reads(experts: Any, given: Sequence[Any]) -> Iterator[Seen]:
    x_NI, chosen_NK = given[:2]
    x_NI = x_NI.flatten(0, -2)
    first, layout = next(iter(_interface_maps(experts).items()))
    for number, map_OI in enumerate(layout.maps(getattr(experts, first).data)):
        at_N = _at(chosen_NK, number)
        if len(at_N):
            read_NI = x_NI[at_N]
            yield Seen(first, read_NI, number, at_N)
            made_NO = linear(read_NI, map_OI, getattr(experts, f"{first}_bias")[number] if experts.has_bias else None)
            middle_NO = experts._apply_gate(made_NO) if experts.has_gate else experts.act_fn(made_NO)
            yield Seen("down_proj", middle_NO, number, at_N)


# Llama 4: every expert reads every position, times its score.


def _scored_maps(experts: Any) -> Mapping[str, Layout]:
    layout = Layout(True, experts.num_experts)
    return {"gate_up_proj": layout, "down_proj": layout}


def _scored_reads(experts: Any, given: Sequence[Any]) -> Iterator[Seen]:
    for number, x_NI in enumerate(given[0].view(experts.num_experts, -1, given[0].shape[-1])):
        yield Seen("gate_up_proj", x_NI, number)
        gate_NO, up_NO = (x_NI @ experts.gate_up_proj[number]).chunk(2, dim=-1)
        yield Seen("down_proj", up_NO * experts.act_fn(gate_NO), number)


# DBRX: the experts' rows one below the other, in a module of their own.


def _stacked_maps(experts: Any) -> Mapping[str, Layout]:
    E = experts.num_experts
    return {"mlp.w1": Layout(False, E), "mlp.v1": Layout(False, E), "mlp.w2": Layout(True, E)}


def _stacked_reads(experts: Any, given: Sequence[Any]) -> Iterator[Seen]:
    x_NI, chosen_NK = given[0].flatten(0, -2), given[1]
    maps = {name: layout.maps(experts.get_parameter(name).data) for name, layout in _stacked_maps(experts).items()}
    for number in range(experts.num_experts):
        at_N = _at(chosen_NK, number)
        if len(at_N):
            read_NI = x_NI[at_N]
            yield Seen("mlp.w1", read_NI, number, at_N)
            yield Seen("mlp.v1", read_NI, number, at_N)
            gate_NO = experts.mlp.activation_fn(linear(read_NI, maps["mlp.w1"][number]))
            yield Seen("mlp.w2", gate_NO * linear(read_NI, maps["mlp.v1"][number]), number, at_N)


# JetMoE: the inputs of all experts in one list, sorted by expert; the router beside them says which is whose.


def _sorted_maps(block: Any) -> Mapping[str, Layout]:
    return {
        f"{name}.weight": Layout(False, getattr(block, name).num_experts) for name in ("input_linear", "output_linear")
    }


def _sorted_reads(block: Any, given: Sequence[Any]) -> Iterator[Seen]:
    x_NI = given[0].flatten(0, -2)
    _, at_M, _, sizes, _ = block.router(x_NI)
    made = block.input_linear(x_NI[at_M], sizes)
    gate_MO, up_MO = made.chunk(2, dim=-1)
    middle_MO = block.activation(gate_MO) * up_MO
    for number, (at_N, middle_NO) in enumerate(zip(at_M.split(sizes), middle_MO.split(sizes))):
        if len(at_N):
            yield Seen("input_linear.weight", x_NI[at_N], number, at_N)
            yield Seen("output_linear.weight", middle_NO, number, at_N)


def _has(*names: str) -> Callable[[Any], bool]:
    return lambda module: all(hasattr(module, name) for name in names)


WAYS = (
    Way(_has("_apply_gate", "is_transposed", "down_proj"), _interface_maps, _interface_reads),
    Way(lambda module: type(module).__name__ == "Llama4TextExperts", _scored_maps, _scored_reads),
    Way(lambda module: type(module).__name__ == "DbrxExperts", _stacked_maps, _stacked_reads),
    Way(lambda module: type(module).__name__ == "JetMoeMoE", _sorted_maps, _sorted_reads),
)
