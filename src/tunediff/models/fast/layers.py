"""Linear layers whose products the compiled kernels make, where these are faster and as exact."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tunediff import kernels
from tunediff.models.fast.weights import kept


class Linear(nn.Linear):
    """torch's linear layer; in inference mode `kernels.product` makes its products where it can."""

    def forward(self, input: Tensor, against: tuple[Tensor, bool] | None = None) -> Tensor | None:
        """Map (..., I) to (..., O). With `against` return `divergence_of`, called through `forward` so that hooks still fire."""
        if against is not None:
            tiles = kept.right_side(self.weight)[0] if _ours() else None
            found = isinstance(tiles, kernels.Tiles)
            return kernels.divergence_of(input, self.weight, tiles, *against) if found else None
        found = kernels.product(input, *kept.right_side(self.weight)) if _ours() else None
        if found is None:
            return super().forward(input)
        return found if self.bias is None else found.add_(self.bias)


@contextmanager
def quickened(modules: Iterable[nn.Module]) -> Iterator[None]:
    """While inside, every plain linear layer is a `Linear`. Parameters, names, states and other layers stay as they are."""
    plain = [module for module in modules if type(module) is nn.Linear]
    for module in plain:
        module.__class__ = Linear
    try:
        yield
    finally:
        for module in plain:
            if type(module) is Linear:
                module.__class__ = nn.Linear


def watched(module: nn.Module) -> bool:
    """Whether somebody's hook looks at what goes into a module or comes out of it."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _ours() -> bool:
    return torch.is_inference_mode_enabled() and not torch.is_autocast_enabled("cpu")


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
