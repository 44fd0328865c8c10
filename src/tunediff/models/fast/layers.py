"""A network's layers, faster where the machine can and as exact: its products, its norms, its gates."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from tunediff import kernels
from tunediff.models.fast.weights import kept


class Linear(nn.Linear):
    """torch's layer; in inference mode, in which models are run here, its products are made by `kernels.product` if that serves."""

    def forward(self, input: Tensor, against: tuple[Tensor, bool] | None = None) -> Tensor | None:
        """As `torch.nn.Linear`: (..., I) to (..., O). Or see `divergence_of`: called like any other, so that who counts sees it."""
        if against is not None:
            tiles = kept.right_side(self.weight)[0] if _ours() else None
            found = isinstance(tiles, kernels.Tiles)
            return kernels.divergence_of(input, self.weight, tiles, *against) if found else None
        found = kernels.product(input, *kept.right_side(self.weight)) if _ours() else None
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
        if not _ours() or self.training or len(given) != 1 or named or watched(self.act_fn):
            return super().forward(*given, **named)
        gate, up = self.gate_proj(*given), self.up_proj(*given)
        found = kernels.gated(gate, up)
        return self.down_proj(self.act_fn(gate) * up if found is None else found)


@contextmanager
def quickened(modules: Iterable[nn.Module]) -> Iterator[None]:
    """While inside, every plain linear layer is a `Linear`, and `Norm` and `Gated` stand before the classes of those
    that, on trial, do just what they do. Parameters, names, states and other layers stay as they are."""
    changed: list[tuple[nn.Module, type, type]] = []
    try:
        for module in modules:
            own, faster = type(module), _faster(module)
            if faster is not None:
                module.__class__ = faster
                changed.append((module, own, faster))
        yield
    finally:
        for module, own, faster in changed:
            if type(module) is faster:
                module.__class__ = own


def _faster(module: nn.Module) -> type | None:
    """The class that a module is given meanwhile; None where it keeps its own."""
    if type(module) is nn.Linear:
        return Linear
    if isinstance(module, (Norm, Gated)):
        return None
    if list(module._parameters) == ["weight"] and not module._modules and _epsilon(module) is not None:
        if _agree(
            module,
            lambda: len(module.weight),
            lambda x: nn.functional.rms_norm(x, x.shape[-1:], module.weight, _epsilon(module)),
        ):
            return _before(Norm, type(module))
    elif set(module._modules) == {"gate_proj", "up_proj", "down_proj", "act_fn"}:
        if _agree(module.act_fn, lambda: 64, nn.functional.silu) and _agree(
            module,
            lambda: module.gate_proj.in_features,
            lambda x: module.down_proj(nn.functional.silu(module.gate_proj(x)) * module.up_proj(x)),
        ):
            return _before(Gated, type(module))
    return None


def _agree(module: nn.Module, width: Callable[[], int], other: Callable[[Tensor], Tensor]) -> bool:
    """Whether a module in float32 on the CPU does to rows of this width, of any size, what `other` does, and does something."""
    if "forward" in vars(module) or any(map(watched, module.modules())):
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


def watched(module: nn.Module) -> bool:
    """Whether somebody's hook looks at what goes into a module or comes out of it."""
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
    plain = type(linear) is Linear and linear.bias is None and "forward" not in vars(linear) and not watched(linear)
    return linear(x_RD, (logp_QV, theirs)) if plain and kept.depth else None


@contextmanager
def contiguous(linear: nn.Module) -> Iterator[None]:
    """While inside, a layer is given its input side by side: torch multiplies scattered rows by a copy of the weight each.

    The last positions of a batch of prompts lie scattered, and the unembedding is the largest weight of all.
    """
    handle = linear.register_forward_pre_hook(lambda module, given: (given[0].contiguous(),))
    try:
        yield
    finally:
        handle.remove()
