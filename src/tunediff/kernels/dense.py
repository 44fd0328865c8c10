"""Dense reference: codes as one (N, F) tensor with gradients by autograd; slow for large F, but easy to check."""

from __future__ import annotations

import torch
from torch import Tensor

from tunediff.kernels import gates


class DenseCode:
    """Codes stored as one tensor f_NF, zeros included."""

    def __init__(self, f_NF: Tensor):
        self.f_NF = f_NF

    @classmethod
    def encode(cls, x_NI: Tensor, encoder_FI: Tensor, bias_F: Tensor, gate: gates.Gate | None) -> DenseCode:
        """Encode by one matrix product and ReLU, and set codes to 0 that the gate does not keep."""
        pre_NF = torch.addmm(bias_F, x_NI, encoder_FI.T)
        f_NF = torch.relu(pre_NF)
        if gate is not None:
            mask = torch.zeros_like(f_NF).view(-1)
            mask[gates.keep(pre_NF.detach(), gate.weight_F, gate.parts)] = 1
            f_NF = f_NF * mask.view_as(f_NF)
        return cls(f_NF)

    def decode(self, decoder_FI: Tensor, cuts: tuple[int, ...] = ()) -> Tensor:
        """Return sum_j f_j W_j over the latents before, between and after the cuts, (N, len(cuts) + 1, I)."""
        edges = (0, *cuts, len(decoder_FI))
        return torch.stack([self.f_NF[:, a:b] @ decoder_FI[a:b] for a, b in zip(edges, edges[1:])], 1)

    def weighted(self, weight_F: Tensor) -> Tensor:
        """Return the sum over tokens and latents of f_j * weight_j, a scalar."""
        return (self.f_NF @ weight_F).sum()

    def fired(self) -> Tensor:
        """Return which latents (F,) are on at one token at least."""
        return (self.f_NF > 0).any(0)

    def count(self) -> Tensor:
        """Return the number of codes that are on in the whole batch."""
        return (self.f_NF > 0).sum()

    def dense(self) -> Tensor:
        """Return f_NF itself."""
        return self.f_NF
