"""Kernels: encode, select and decode, the only code that knows how a batch of codes lies in memory.

A dictionary calls `encode(x, W, b, choose, share)` and gets a code: an object with ``decode(W)``,
``only(start, stop)``, ``weighted(w)``, ``fired()``, ``count()`` and ``dense()``. A faster path is one more
module here with such a class; no dictionary changes for it.
"""

from __future__ import annotations

import contextlib
from typing import Callable, Iterator, Protocol

import torch
from torch import Tensor

from tunediff.kernels.dense import DenseCode
from tunediff.kernels.pairs import PairCode

Choose = Callable[[Tensor], "Tensor | None"]
"""From pre-activations (N, F), the flat ascending indices to keep; None keeps every positive one."""


class Code(Protocol):
    """The codes f (N, F) of a batch, however stored; f >= 0."""

    def decode(self, decoder_FI: Tensor) -> Tensor:
        """sum_j f_j W_j, (N, I); differentiable in the codes and in W."""

    def only(self, start: int, stop: int) -> "Code":
        """The same code with every latent outside [start, stop) set to 0."""

    def weighted(self, weight_F: Tensor) -> Tensor:
        """sum over tokens and latents of f_j * weight_j, a scalar; differentiable in both."""

    def fired(self) -> Tensor:
        """Which latents (F,) are on at one token at least; bool."""

    def count(self) -> Tensor:
        """How many codes are on in the whole batch; an integer scalar."""

    def dense(self) -> Tensor:
        """The codes as one (N, F) tensor."""


PAIRS_LATENTS, PAIRS_SHARE = 256, 0.1
"""From this many latents on, and up to this share of them kept, pairs are faster than a dense tensor
(measured)."""


def encode(x_NI: Tensor, encoder_FI: Tensor, bias_F: Tensor, choose: Choose, share: float) -> Code:
    """ReLU(x @ W.T + b), kept where `choose` says; gradients reach W and b through kept codes only.

    `share`: about which share of all codes `choose` will keep; it decides the layout and nothing else.
    """
    pairs = encoder_FI.shape[0] >= PAIRS_LATENTS and share <= PAIRS_SHARE
    return (PairCode if pairs else DenseCode).encode(x_NI, encoder_FI, bias_F, choose)


@contextlib.contextmanager
def fast_matmul() -> Iterator[str]:
    """Let torch pick its faster fp32 matmul inside, if a probe shows that it stays as exact as the default.

    On some CPUs the "medium" setting selects a library about twice as fast at full fp32 precision; on others
    it rounds the inputs to bf16, which the probe refuses (relative error over 2e-6 against fp64). Yields the
    setting in force.
    """
    before = torch.get_float32_matmul_precision()
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(64, 256, generator=generator), torch.randn(256, 64, generator=generator)
    exact = a.double() @ b.double()
    try:
        torch.set_float32_matmul_precision("medium")
        if float(((a @ b).double() - exact).norm() / exact.norm()) > 2e-6:
            torch.set_float32_matmul_precision(before)
        yield torch.get_float32_matmul_precision()
    finally:
        torch.set_float32_matmul_precision(before)
