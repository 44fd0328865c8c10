"""Codes on a GPU with a fixed number of pairs, so that the host never waits to learn a size.

The encoder's product runs in TF32 and only decides which codes are kept. Kept values are computed again in full
precision, and gradients flow through these.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from tunediff.kernels import gates, paths
from tunediff.kernels.matmuls import precision
from tunediff.kernels.sparse import EncodeAtPairs, PairCode, Pairs


class GpuCode(PairCode):
    """Codes stored as pairs, some with value 0, with the pre-activations they were selected from; see `Code`."""

    host_waits = False

    def __init__(self, pairs: Pairs, origin: tuple[Tensor, ...]):
        x_NI, encoder_FI, bias_F, _ = origin
        with torch.no_grad():
            pre_P = pairs.dot(x_NI, encoder_FI) + bias_F[pairs.latent_P.clamp_max(pairs.F - 1)]
            pre_P.masked_fill_(pairs.latent_P == pairs.F, 0.0)
        super().__init__(pairs, torch.relu(EncodeAtPairs.apply(x_NI, encoder_FI, bias_F, pre_P, pairs)), origin)  # type: ignore[no-untyped-call]

    @classmethod
    def encode(cls, x_NI: Tensor, encoder_FI: Tensor, bias_F: Tensor, gate: gates.Gate) -> GpuCode:
        """Encode by one TF32 product that selects codes, whose values are computed again in full precision."""
        with torch.no_grad(), _tf32(x_NI.device):
            pre_NF = torch.addmm(bias_F, x_NI, encoder_FI.T)
        token_P, latent_P, _, starts_N = paths.on_gpu(pre_NF).select(pre_NF, gate.weight_F, gate.parts)
        return cls(Pairs(token_P, latent_P, starts_N, *pre_NF.shape), (x_NI, encoder_FI, bias_F, pre_NF))

    def among(self, weight_F: Tensor, k: int) -> GpuCode:
        """Return the code that keeps on each token the k largest f * w among latents with w > 0."""
        *_, pre_NF = self._origin
        N, F = pre_NF.shape
        latent_NK = paths.on_gpu(pre_NF).best(pre_NF, weight_F, k)  # F marks an unused place
        starts_N = torch.arange(N + 1, device=pre_NF.device) * k
        token_P = torch.arange(N, device=pre_NF.device)[:, None].expand(N, k).reshape(-1)
        return GpuCode(Pairs(token_P, latent_NK.view(-1), starts_N, N, F), self._origin)


def _tf32(device: torch.device) -> AbstractContextManager[None]:
    """Allow TF32 tensor cores for float32 products on a GPU; on other devices change nothing."""
    return precision("high") if device.type == "cuda" else nullcontext()
