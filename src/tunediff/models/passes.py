"""Forward passes: where one starts, who watches it, and how its blocks are hooked, replaced and stopped."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tunediff.records.site import Site


class Stop(Exception):
    """Ends a forward pass whose remaining blocks nobody needs."""


@dataclass(frozen=True, eq=False)
class Start:
    """The start of a pass that skips the lower blocks: the stream (B, T, D) that ``site``'s block puts out."""

    site: Site
    stream_BTD: Tensor

    def part(self, rows: slice, positions: slice) -> Start:
        """The start of some rows and positions."""
        return Start(self.site, self.stream_BTD[rows, positions])


@dataclass(frozen=True, eq=False)
class Watch:
    """An observer of the inputs of some modules during a pass, with C weights for each position (B, T, C).

    Positions that share one computation are reported once, with their weights summed.

    see   called with the module, the arguments of its call, and the weights of all positions laid out flat (C, B * T)
    """

    modules: Sequence[nn.Module]
    weight_BTC: Tensor
    see: Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Tensor], None]


def first(output: Any) -> Tensor:
    """The stream in what a block returns: the output itself, or the first of a tuple."""
    stream: Tensor = output[0] if isinstance(output, tuple) else output
    return stream


def with_first(output: Any, stream: Tensor) -> Any:
    """What a block returns, with another stream in it."""
    return (stream, *output[1:]) if isinstance(output, tuple) else stream


def returns_tuple(network: nn.Module, block: nn.Module) -> bool:
    """Whether a network's block returns a tuple, found by a pass of one token."""
    seen: list[bool] = []
    handle = block.register_forward_hook(lambda module, given, output: seen.append(isinstance(output, tuple)))
    try:
        network(
            input_ids=torch.zeros(1, 1, dtype=torch.long, device=next(network.parameters()).device), use_cache=False
        )
    finally:
        handle.remove()
    return seen[0]


@contextmanager
def replaced(owner: object, name: str, value: Any) -> Iterator[None]:
    """While inside, an instance has an attribute of its own; on leaving it is what it was, or gone if there was none."""
    there, before = name in vars(owner), vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before) if there else delattr(owner, name)
