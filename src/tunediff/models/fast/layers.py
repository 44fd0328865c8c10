"""A network's layers, faster where the machine can and as exact: its products, its norms, its gates."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from tunediff import kernels

KEPT = 2 << 30
"""Bytes of weights in tiles that are kept at once, besides the weights: those of a billion that were published in bfloat16."""


class Linear(nn.Linear):
    """torch's layer; in inference mode, in which models are run here, its products are made by `kernels.product` if that serves."""

    def forward(self, input: Tensor, against: tuple[Tensor, bool] | None = None) -> Tensor | None:
        """As `torch.nn.Linear`: (..., I) to (..., O). Or see `divergence_of`: called like any other, so that who counts sees it."""
        if against is not None:
            kept = _frozen.tiles(self.weight)[0] if _ours() else None
            return (
                kernels.divergence_of(input, self.weight, kept, *against) if isinstance(kept, kernels.Tiles) else None
            )
        found = kernels.product(input, *_frozen.tiles(self.weight)) if _ours() else None
        if found is None:
            return super().forward(input)
        return found if self.bias is None else found.add_(self.bias)


class Norm(nn.Module):
    """Stands before a class that divides rows by their root mean square: in inference mode `kernels.rms_norm` does, if that serves."""

    def forward(self, *given: Any, **named: Any) -> Any:
        """(..., I) to (..., I); whatever else is given is the class's own to understand."""
        only = _ours() and len(given) == 1 and not named
        found = kernels.rms_norm(given[0], self.weight, _epsilon(self)) if only else None
        return super().forward(*given, **named) if found is None else found


class Gated(nn.Module):
    """Stands before the class of an MLP gated by SiLU: in inference mode `kernels.gated` makes what is between its maps, if that serves."""

    def forward(self, *given: Any, **named: Any) -> Any:
        """(..., I) to (..., I); whatever else is given is the class's own to understand."""
        if not _ours() or self.training or len(given) != 1 or named or _watched(self.act_fn):
            return super().forward(*given, **named)
        gate, up = self.gate_proj(*given), self.up_proj(*given)
        found = kernels.gated(gate, up)
        return self.down_proj(self.act_fn(gate) * up if found is None else found)


def quicken(network: nn.Module) -> None:
    """Make every plain linear layer a `Linear`, and let `Norm` and `Gated` stand before the classes of those that, on trial, do just
    what they do. Parameters, names and states stay as they are, and so do layers of another kind and those that somebody watches; only
    who pickles a whole network or asks for a layer's very class sees another one."""
    for module in network.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear
        elif isinstance(module, (Norm, Gated)):
            continue
        elif list(module._parameters) == ["weight"] and not module._modules and _epsilon(module) is not None:
            if _agree(
                module,
                lambda: len(module.weight),
                lambda x: nn.functional.rms_norm(x, x.shape[-1:], module.weight, _epsilon(module)),
            ):
                module.__class__ = _before(Norm, type(module))
        elif set(module._modules) == {"gate_proj", "up_proj", "down_proj", "act_fn"}:
            if _agree(module.act_fn, lambda: 64, nn.functional.silu) and _agree(
                module,
                lambda: module.gate_proj.in_features,
                lambda x: module.down_proj(nn.functional.silu(module.gate_proj(x)) * module.up_proj(x)),
            ):
                module.__class__ = _before(Gated, type(module))


def _agree(module: nn.Module, width: Callable[[], int], other: Callable[[Tensor], Tensor]) -> bool:
    """Whether a module in float32 on the CPU does to rows of this width, of any size, what `other` does, and does something."""
    if "forward" in vars(module) or any(map(_watched, module.modules())):
        return False
    if any(p.dtype != torch.float32 or p.device.type != "cpu" for p in module.parameters()):
        return False
    try:
        x_RI = torch.randn(3, width(), generator=torch.Generator().manual_seed(0), dtype=torch.float32) * torch.tensor(
            [[0.01], [1.0], [100.0]]
        )
        with torch.inference_mode():
            expected = other(x_RI)
            return bool(expected.any(1).all()) and torch.allclose(
                type(module).forward(module, x_RI), expected, rtol=1e-4, atol=1e-6
            )
    except Exception:  # of whatever kind a module raises that is not what it looks like
        return False


def _watched(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


@cache
def _before(faster: type, known: type) -> type:
    """The class `known` with `faster` before it; to who prints it or asks what it is it stays what it was."""
    return type(known.__name__, (faster, known), {"__module__": known.__module__, "__qualname__": known.__qualname__})


def _ours() -> bool:
    return torch.is_inference_mode_enabled() and not torch.is_autocast_enabled("cpu")


def _epsilon(module: nn.Module) -> float | None:
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


def divergence_of(linear: nn.Module, x_RD: Tensor, logp_QV: Tensor, theirs: bool) -> Tensor | None:
    """`kernels.divergence_of` the logits that a layer makes; None where that does not serve, as where its weights are not frozen."""
    plain = type(linear) is Linear and linear.bias is None and "forward" not in vars(linear) and not _watched(linear)
    return linear(x_RD, (logp_QV, theirs)) if plain and _frozen.depth else None


class _Frozen(threading.local):
    """What is made of weights, for as long as somebody has said that nobody writes to them. Weights in tiles are kept with the weights,
    or others could come to lie where they lay. A write that torch counts is seen all the same (not one through `.data`, numpy or a
    fused optimizer)."""

    def __init__(self) -> None:
        self.depth = 0
        self.clear()

    def clear(self) -> None:
        self.bytes, self.kept, self.others = 0, {}, {}

    def tiles(self, weight: nn.Parameter) -> tuple[kernels.Tiles | Tensor, bool]:
        """By what to multiply, and whether also few rows: where weights are frozen, kept or not, so that bits do not hang on room."""
        if not self.depth or weight.is_inference():
            return weight, False
        key = weight.data_ptr(), weight.shape, weight.stride()
        found, _, version = self.kept.get(key, (None, None, None))
        if version != weight._version:
            self.forget([weight])
            found = kernels.tiles(weight.detach(), KEPT - self.bytes)
            self.bytes += found.nbytes if found else 0
            self.kept[key] = found, weight.detach() if found else None, weight._version
        return found or weight, True

    def forget(self, weights: Iterable[Tensor]) -> None:
        for weight in weights:
            made = self.kept.pop((weight.data_ptr(), weight.shape, weight.stride()), (None,))[0]
            self.bytes -= made.nbytes if made else 0


_frozen = _Frozen()
forget = _frozen.forget
"""What is kept of some weights is given up, as of those that are about to be freed."""


clear = _frozen.clear
"""All that is kept is given up."""


@contextmanager
def frozen() -> Iterator[None]:
    """While inside nobody writes to weights (a parameter may be given others, as `models.swapped` does): what products need of them
    is made once."""
    _frozen.depth += 1
    try:
        yield
    finally:
        _frozen.depth -= 1
        if not _frozen.depth:
            clear()


def kept_meanwhile() -> dict | None:
    """Where others keep what hangs on weights, for as long as nobody writes to them; None where somebody may."""
    return _frozen.others if _frozen.depth else None
