"""What is made of weights and kept while nobody writes to them: weights in tiles, prefix caches."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from tunediff import kernels

ROOM = 2 << 30
"""Most bytes of tiles kept at once: enough for a billion weights that were published in bfloat16."""


class Kept(threading.local):
    """A thread's store of what was made of weights.

    Tiles are kept together with their weights, so that no other weights can come to lie at the same address. A write
    that torch counts is noticed; one through `.data`, numpy or a fused optimizer is not.
    """

    def __init__(self) -> None:
        self.depth = 0
        self.clear()

    def clear(self) -> None:
        """Forget all that is kept."""
        self.bytes = 0
        self.made: dict[tuple[Any, ...], tuple[kernels.Tiles | None, Tensor | None, int]] = {}
        self.prefixes: dict[Any, Any] = {}

    def right_side(self, weight: nn.Parameter) -> tuple[kernels.Tiles | Tensor, bool]:
        """Return the weight (in tiles if these are kept) and whether small batches use the kernel too.

        The second answer never depends on free memory, so that bits do not depend on it either.
        """
        if not self.depth or weight.is_inference():
            return weight, False
        key = weight.data_ptr(), weight.shape, weight.stride()
        found, _, version = self.made.get(key, (None, None, None))
        if version != weight._version:
            self.forget([weight])
            found = kernels.tiles(weight.detach(), ROOM - self.bytes)
            self.bytes += found.nbytes if found else 0
            self.made[key] = found, weight.detach() if found else None, weight._version
        return found or weight, True

    def forget(self, weights: Iterable[Tensor]) -> None:
        """Forget what is kept of some weights, as of those that are about to be freed."""
        for weight in weights:
            tiles = self.made.pop((weight.data_ptr(), weight.shape, weight.stride()), (None,))[0]
            self.bytes -= tiles.nbytes if tiles else 0


kept = Kept()
forget = kept.forget


@contextmanager
def holding() -> Iterator[None]:
    """While inside nobody writes to weights, so what is made of them is kept until the outermost hold ends.

    A parameter may be given other values meanwhile, as `models.network.swapped` does.
    """
    kept.depth += 1
    try:
        yield
    finally:
        kept.depth -= 1
        if not kept.depth:
            kept.clear()
