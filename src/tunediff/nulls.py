"""Nulls: pairs in which there is nothing to find, made from a pair without training."""

from __future__ import annotations

from dataclasses import replace
from typing import Callable

import torch
from torch import nn

from tunediff.chance import generator, seed_of
from tunediff.errors import SourceError
from tunediff.models import LanguageModel
from tunediff.pairs import Pair


def identical(pair: Pair, seed: int) -> Pair:
    """Base against itself: whoever finds something here is broken."""
    return Pair.load(pair.base.name, pair.base.name, allow_identical=True)


def rounded(pair: Pair, seed: int) -> Pair:
    """Base against base with its weights rounded to bfloat16: a change of every weight that no one trained."""
    null = identical(pair, seed)
    for parameter in null.tuned.module.parameters():
        parameter.data = parameter.data.bfloat16().to(parameter.dtype)
    return replace(null, tuned_fingerprint=f"{null.base_fingerprint} rounded")


def random_tune(pair: Pair, seed: int) -> Pair:
    """Base plus, in every map the tune touched, a Gaussian change of its rank and norm."""
    return _null(pair, pair.random_tuned(seed_of(seed, "null tune")), f"random {seed}")


def permuted(pair: Pair, seed: int) -> Pair:
    """The tune's own changes with the inputs and outputs of every map in another order: its spectrum, without its meaning."""
    tensors: dict[nn.Parameter, torch.Tensor] = {}
    for delta in pair.deltas():
        if delta.up_parameter is None:
            raise SourceError("a full fine-tune has no adapter to permute", expected="a LoRA over base", remedy="the null random")
        rng = generator(seed, "permuted adapter", delta.name)
        down, up = delta.down_parameter.data, delta.up_parameter.data
        tensors[delta.down_parameter] = down[:, torch.randperm(down.shape[1], generator=rng)]
        tensors[delta.up_parameter] = up[torch.randperm(up.shape[0], generator=rng)]
    return _null(pair, pair.tuned.variant(f"permuted adapter {seed}", tensors), f"permuted {seed}")


def _null(pair: Pair, tuned: LanguageModel, name: str) -> Pair:
    return replace(pair, tuned=tuned, tuned_fingerprint=f"{pair.tuned_fingerprint} {name}")


NULLS: dict[str, Callable[[Pair, int], Pair]] = {
    "identical": identical, "rounded": rounded, "random": random_tune, "permuted": permuted,
}
"""By name; each takes a pair and a seed and gives the null pair. Trained nulls (placebo, format only) are organisms."""
