"""Forward passes: where one starts, who watches it, and how its blocks are hooked, replaced and stopped."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from tunediff.core.errors import FamilyError
from tunediff.records.site import Site

OTHER_NETWORK = "take a decoder of another architecture, or --set pair.family=MODULE:CLASS with a family of your own"
"""What can be done about a network that cannot be read."""


def reason(fault: Exception) -> str:
    """What another library's error says, in a line."""
    lines = str(fault).strip().splitlines() or [""]
    return f"{type(fault).__name__}: {lines[0][:160]}"


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
    stream: Tensor = output[0] if isinstance(output, (tuple, list)) else output
    return stream


def with_first(output: Any, stream: Tensor) -> Any:
    """What a block returns, with another stream in it."""
    return type(output)((stream, *output[1:])) if isinstance(output, (tuple, list)) else stream


@dataclass(frozen=True)
class Form:
    """How a block puts out its stream: alone or first in a tuple, and as one stream or as several beside each other.

    Several streams (B, T, P, D) or (P, B, T, D), as of networks with hyper-connections, are read as one of width P * D.

    width    of the stream as it is read
    others   how many values follow the stream in a tuple; None where the stream is all that is put out
    shape    of the several streams with their axes of rows and positions first, as (P, D); None for one stream
    front    whether the axis of several streams comes first of all
    """

    width: int
    others: int | None = None
    shape: tuple[int, int] | None = None
    front: bool = False

    @classmethod
    def of(cls, output: Any, rows: int, positions: int) -> Form | None:
        """The form of what a block put out for a batch of this shape; None where there is no stream in it."""
        several = isinstance(output, (tuple, list))
        value = output[0] if several and output else output
        if not isinstance(value, Tensor) or value.dim() not in (3, 4):
            return None
        axes, others = tuple(value.shape), len(output) - 1 if several else None
        if len(axes) == 3:
            return cls(axes[2], others) if axes[:2] == (rows, positions) else None
        if axes[:2] == (rows, positions):
            return cls(axes[2] * axes[3], others, (axes[2], axes[3]))
        if axes[1:3] == (rows, positions):
            return cls(axes[0] * axes[3], others, (axes[0], axes[3]), True)
        return None

    def stream(self, output: Any) -> Tensor:
        """The stream (B, T, D) in what a block put out."""
        value = first(output)
        if self.shape is None:
            return value
        return (value.movedim(0, 2) if self.front else value).flatten(2)

    def output(self, stream_BTD: Tensor) -> Any:
        """What a block with this stream puts out; nothing takes the place of what follows in a tuple."""
        value = stream_BTD if self.shape is None else stream_BTD.unflatten(2, self.shape)
        value = value.movedim(2, 0) if self.front else value
        return value if self.others is None else (value, *[None] * self.others)

    def replaced(self, output: Any, stream_BTD: Tensor) -> Any:
        """What a block put out, with another stream in it."""
        return with_first(output, first(self.output(stream_BTD)))


def taken(network: nn.Module, **named: Any) -> dict[str, Any]:
    """Those of some arguments that a network's forward knows by name."""
    known = signature(network.forward).parameters
    return {name: value for name, value in named.items() if name in known}


def cached(network: nn.Module, cache: Any) -> dict[str, Any]:
    """Keys and values to go on from, as an argument of a network's forward; empty where it takes none.

    Newer versions of transformers call it ``cache``, older ones ``past_key_values``.
    """
    return dict(list(taken(network, cache=cache, past_key_values=cache).items())[:1])


@dataclass(frozen=True)
class Forms:
    """What the blocks of a network put out: the form of each, and whether each is called once a pass."""

    blocks: tuple[Form, ...]
    once: bool

    @classmethod
    def of(cls, network: nn.Module, blocks: nn.ModuleList, rows: int = 5, positions: int = 7) -> Forms:
        """Look at the blocks of a network in one pass of a few tokens.

        Raises `FamilyError` where a block is never called, or puts out no stream.
        """
        seen: list[list[Form | None]] = [[] for _ in blocks]
        with ExitStack() as stack:
            for number, block in enumerate(blocks):

                def look(module: nn.Module, given: Any, output: Any, number: int = number) -> None:
                    seen[number].append(Form.of(output, rows, positions))

                stack.callback(block.register_forward_hook(look).remove)
            ids_BT = torch.ones(rows, positions, dtype=torch.long, device=next(network.parameters()).device)
            network(input_ids=ids_BT, use_cache=False)
        found = [calls[-1] if calls else None for calls in seen]
        if None in found or len({form.width for form in found if form}) != 1:
            where = found.index(None) if None in found else 0
            raise FamilyError(
                f"the blocks of {type(network).__name__} have no stream that goes from one to the next",
                expected="blocks that put out one vector of equal width for each position",
                got=f"none from block {where}" if None in found else "vectors of several widths",
                remedy=OTHER_NETWORK,
            )
        return cls(tuple(form for form in found if form), all(len(calls) == 1 for calls in seen))


@contextmanager
def replaced(owner: object, name: str, value: Any) -> Iterator[None]:
    """While inside, an instance has an attribute of its own; on leaving it is what it was, or gone if there was none."""
    there, before = name in vars(owner), vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before) if there else delattr(owner, name)
