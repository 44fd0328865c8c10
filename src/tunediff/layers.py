"""A network's layers, faster where the machine can and as exact: its products, its norms, its gates."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from functools import lru_cache
from typing import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from tunediff import kernels

KEPT = 2 << 30
"""Bytes of weights in tiles that are kept at once, besides the weights: those of a billion that were published in bfloat16."""


class Linear(nn.Linear):
    """torch's layer; in inference mode, in which models are run here, its products are made by `kernels.product` if that serves."""

    def forward(self, input: Tensor) -> Tensor:
        """As `torch.nn.Linear`: (..., I) to (..., O)."""
        found = kernels.product(input, _frozen.tiles(self.weight) or self.weight) if _ours() else None
        if found is None:
            return super().forward(input)
        return found if self.bias is None else found.add_(self.bias)


class Norm(nn.Module):
    """Stands before a class that divides rows by their root mean square: in inference mode `kernels.rms_norm` does, if that serves."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) to (..., I)."""
        found = kernels.rms_norm(x, self.weight, _epsilon(self)) if _ours() else None
        return super().forward(x) if found is None else found


class Gated(nn.Module):
    """Stands before the class of an MLP gated by SiLU: in inference mode `kernels.gated` makes what is between its maps, if that serves."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) to (..., I)."""
        if not _ours():
            return super().forward(x)
        gate, up = self.gate_proj(x), self.up_proj(x)
        found = kernels.gated(gate, up)
        return self.down_proj(self.act_fn(gate) * up if found is None else found)


def quicken(network: nn.Module) -> None:
    """Make every plain linear layer a `Linear`, and let `Norm` and `Gated` stand before classes that, on trial, do just what they do.
    Parameters, names and states stay as they are, and so do layers of another kind; only who pickles a whole network or asks for a
    layer's very class sees another one."""
    gated: dict[tuple[type, type], bool] = {}
    for module in network.modules():
        kind = type(module)
        if kind is nn.Linear:
            module.__class__ = Linear
        elif issubclass(kind, (Norm, Gated)) or not _serves(module):
            continue
        elif list(module._parameters) == ["weight"] and not module._modules and _epsilon(module) is not None:
            if _agree(module, len(module.weight), lambda x: nn.functional.rms_norm(x, x.shape[-1:], module.weight, _epsilon(module))):
                module.__class__ = _before(Norm, kind)
        elif set(module._modules) == {"gate_proj", "up_proj", "down_proj", "act_fn"}:
            known = kind, type(module.act_fn)
            if known not in gated:
                gated[known] = _agree(module, module.config.hidden_size, lambda x: module.down_proj(
                    nn.functional.silu(module.gate_proj(x)) * module.up_proj(x)))
            if gated[known]:
                module.__class__ = _before(Gated, kind)


def _serves(module: nn.Module) -> bool:
    first = next(module.parameters(), None)
    return first is not None and first.device.type == "cpu" and first.dtype == torch.float32


def _agree(module: nn.Module, width: int, other: Callable[[Tensor], Tensor]) -> bool:
    """Whether a module does to rows of this width, of any size, what `other` does."""
    x_RI = torch.randn(3, width, generator=torch.Generator().manual_seed(0)) * torch.tensor([[0.01], [1.0], [100.0]])
    try:
        with torch.inference_mode():
            return torch.allclose(module(x_RI), other(x_RI), rtol=1e-4, atol=1e-6)
    except Exception:  # of whatever kind a module raises that is not what it looks like
        return False


@lru_cache(maxsize=None)
def _before(faster: type, known: type) -> type:
    """The class `known` with `faster` before it; to who prints it or asks what it is it stays what it was."""
    return type(known.__name__, (faster, known), {"__module__": known.__module__, "__qualname__": known.__qualname__})


def _ours() -> bool:
    return torch.is_inference_mode_enabled() and not torch.is_autocast_enabled("cpu")


def _epsilon(module: nn.Module) -> float | None:
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


class _Frozen(threading.local):
    """Weights in tiles, for as long as somebody has said that nobody writes to them. Each is kept with its weight, or another one
    could come to lie where it lay; a write that torch counts is seen all the same."""

    def __init__(self) -> None:
        self.depth, self.room, self.kept, self.others = 0, 0, {}, {}

    def tiles(self, weight: nn.Parameter) -> kernels.Tiles | None:
        if not self.depth or weight.is_inference():
            return None
        key = _key(weight)
        found, _, version = self.kept.get(key, (None, None, None))
        if version == weight._version:
            return found
        self.forget([weight])
        made = kernels.tiles(weight.detach(), self.room)
        self.room -= made.nbytes if made else 0
        self.kept[key] = made, weight.detach(), weight._version
        return made

    def forget(self, weights: Iterable[Tensor]) -> None:
        for weight in weights:
            made = self.kept.pop(_key(weight), (None,))[0]
            self.room += made.nbytes if made else 0


_frozen = _Frozen()
forget = _frozen.forget
"""What is kept of some weights is given up, as of those that are about to be freed."""


def _key(weight: Tensor) -> tuple:
    return weight.data_ptr(), weight.shape, weight.stride()


@contextmanager
def frozen() -> Iterator[None]:
    """While inside nobody writes to weights (a parameter may be given others, as `models.swapped` does): what products need of them
    is made once."""
    if not _frozen.depth:
        _frozen.room = KEPT
    _frozen.depth += 1
    try:
        yield
    finally:
        _frozen.depth -= 1
        if not _frozen.depth:
            _frozen.kept, _frozen.others = {}, {}


def kept_meanwhile() -> dict | None:
    """Where others keep what hangs on weights, for as long as nobody writes to them; None where somebody may."""
    return _frozen.others if _frozen.depth else None
