"""The dense reference: codes as one (N, F) tensor, every gradient by autograd. Slow at large F, right by
inspection."""

from __future__ import annotations

from typing import Callable

import torch
from torch import Tensor


class DenseCode:
    """Codes stored as f_NF, zeros included."""

    def __init__(self, f_NF: Tensor):
        self.f_NF = f_NF

    @classmethod
    def encode(
        cls, x_NI: Tensor, encoder_FI: Tensor, bias_F: Tensor, choose: Callable[[Tensor], Tensor | None]
    ) -> "DenseCode":
        """One GEMM, ReLU, and a mask where `choose` (flat indices to keep) asks for one."""
        pre_NF = torch.addmm(bias_F, x_NI, encoder_FI.T)
        kept = choose(pre_NF.detach())
        f_NF = torch.relu(pre_NF)
        if kept is not None:
            mask = torch.zeros_like(f_NF).view(-1)
            mask[kept] = 1
            f_NF = f_NF * mask.view_as(f_NF)
        return cls(f_NF)

    def decode(self, decoder_FI: Tensor) -> Tensor:
        """sum_j f_j W_j."""
        return self.f_NF @ decoder_FI

    def only(self, start: int, stop: int) -> "DenseCode":
        """Zero outside [start, stop)."""
        mask = torch.zeros_like(self.f_NF[:1])
        mask[:, start:stop] = 1
        return DenseCode(self.f_NF * mask)

    def weighted(self, weight_F: Tensor) -> Tensor:
        """sum f_j * weight_j."""
        return (self.f_NF @ weight_F).sum()

    def fired(self) -> Tensor:
        """Latents on at one token at least."""
        return (self.f_NF > 0).any(0)

    def count(self) -> Tensor:
        """Codes on in the whole batch."""
        return (self.f_NF > 0).sum()

    def dense(self) -> Tensor:
        """f_NF itself."""
        return self.f_NF
