"""The one door of `models.fast`: what makes a network faster is put in on entering a run, and taken out on leaving it."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

from torch import nn

from tunediff.models.fast.attention import attending
from tunediff.models.fast.layers import contiguous, divergence_of, quickened
from tunediff.models.fast.lora import adapted
from tunediff.models.fast.prefixes import Sharing
from tunediff.models.fast.weights import holding, kept

ALLOWED = os.environ.get("TUNEDIFF_FAST") != "0"
"""Whether networks may be accelerated in this process; ``TUNEDIFF_FAST=0`` in the environment says no."""


class Shortcuts(Sharing):
    """What a run may do in less time while its network is accelerated."""

    contiguous = staticmethod(contiguous)
    divergence = staticmethod(divergence_of)
    clear = staticmethod(kept.clear)


class _Inside:
    """One accelerated network: how many are inside, and how to put everything back."""

    def __init__(self, module: Any):
        self.depth, self.shortcuts = 0, Shortcuts(tuple(module.modules()))
        network = module.get_base_model() if hasattr(module, "get_base_model") else module
        with ExitStack() as stack:
            stack.enter_context(quickened(self.shortcuts.modules))
            stack.enter_context(adapted(module))
            stack.enter_context(attending(network))
            self.undo = stack.pop_all()


_inside: dict[nn.Module, _Inside] = {}
_lock = threading.RLock()


@contextmanager
def accelerated(module: nn.Module, hold: bool = False) -> Iterator[Shortcuts | None]:
    """Accelerate a network's runs while inside; once the last has left, the network is to the bit as it was before.

    Classes of layers, the name of the attention, `forward` of LoRA layers and PEFT's `disable_adapter` are replaced
    meanwhile, so copy, pickle or compile a network outside. Entering again costs next to nothing.

    module   a network, or PEFT's wrapper of one
    hold     many runs follow and nobody writes to weights between them (a parameter may be given other values, as
             `models.network.swapped` does): tiles of weights and prefix caches are kept until the outermost hold ends

    Yields the shortcuts that a run may take, or None where ``TUNEDIFF_FAST=0`` turned acceleration off.
    """
    if not ALLOWED:
        yield None
        return
    with _lock:
        inside = _inside.get(module) or _inside.setdefault(module, _Inside(module))
        inside.depth += 1
    try:
        with holding() if hold else nullcontext():
            yield inside.shortcuts
    finally:
        with _lock:
            inside.depth -= 1
            if not inside.depth:
                del _inside[module]
                inside.undo.close()
