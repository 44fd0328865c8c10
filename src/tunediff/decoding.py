"""Attention of one new token a row on the CPU, without a copy of all keys and values for every head that reads them."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any, Iterator

import torch
from torch import Tensor, nn

NAME = "tunediff"


@contextmanager
def light_attention(network: nn.Module) -> Iterator[None]:
    """While inside, where a network attends by torch's fused kernel on the CPU, one query a row is multiplied out plainly.

    The fused kernel is made for many queries; for one, and for heads that share keys, transformers copies the whole cache
    before it. Anything but the plain case goes the usual way.
    """
    config = network.config.get_text_config(decoder=True)
    if getattr(config, "_attn_implementation", None) != "sdpa" or next(network.parameters()).device.type != "cpu":
        yield
        return
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    network.set_attn_implementation(NAME)
    try:
        yield
    finally:
        network.set_attn_implementation("sdpa")


def _attend(module: nn.Module, q_BHTE: Tensor, k_BGSE: Tensor, v_BGSE: Tensor, mask: Tensor | None, scaling: float | None = None,
            **named: Any) -> tuple[Tensor, None]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    B, H, T, E = q_BHTE.shape
    if T > 1 or mask is None or mask.dtype != torch.bool or any(named.get(name) is not None for name in ("softcap", "s_aux", "position_bias")):
        return sdpa_attention_forward(module, q_BHTE, k_BGSE, v_BGSE, mask, scaling=scaling, **named)
    # Heads that share keys are rows of one product.
    q_BGRE = q_BHTE.reshape(B, k_BGSE.shape[1], -1, E) * (E**-0.5 if scaling is None else scaling)
    score_BGRS = (q_BGRE @ k_BGSE.transpose(2, 3)).masked_fill(~mask, torch.finfo(q_BHTE.dtype).min)
    return (score_BGRS.softmax(-1) @ v_BGSE).reshape(B, 1, H, v_BGSE.shape[-1]), None
