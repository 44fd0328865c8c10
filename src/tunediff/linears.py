"""Linear layers that multiply faster where the machine can, as exactly."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import Iterable, Iterator

import torch
from torch import Tensor, nn

from tunediff import kernels

KEPT = 2 << 30
"""Bytes of weights in tiles that are kept at once, besides the weights: those of a billion that were published in bfloat16."""


class Linear(nn.Linear):
    """torch's layer; in inference mode, in which models are run here, its products are made by `kernels.product` if that serves."""

    def forward(self, input: Tensor) -> Tensor:
        """As `torch.nn.Linear`: (..., I) to (..., O)."""
        ours = torch.is_inference_mode_enabled() and not torch.is_autocast_enabled("cpu")
        found = kernels.product(input, _frozen.tiles(self.weight) or self.weight) if ours else None
        if found is None:
            return super().forward(input)
        return found if self.bias is None else found.add_(self.bias)


def quicken(network: nn.Module) -> None:
    """Make every plain linear layer a `Linear`. Its parameters, its names and its state stay as they are, and so do layers of a
    class of their own; only who pickles a whole network or asks for a layer's very class sees another one."""
    for module in network.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear


class _Frozen(threading.local):
    """Weights in tiles, for as long as somebody has said that nobody writes to them. Each is kept with its weight, or another one
    could come to lie where it lay; a write that torch counts is seen all the same."""

    def __init__(self) -> None:
        self.depth, self.room, self.kept = 0, KEPT, {}

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
    _frozen.depth += 1
    try:
        yield
    finally:
        _frozen.depth -= 1
        if not _frozen.depth:
            _frozen.room, _frozen.kept = KEPT, {}
