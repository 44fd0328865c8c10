"""Decoding: attention of one new token a row on the CPU without copies of keys and values, and amplified log-probabilities."""

from __future__ import annotations

import math
from contextlib import contextmanager
from typing import Any, Iterator

import torch
from torch import Tensor, nn

NAME = "tunediff"

PLAUSIBLE = 1e-3
"""Tokens less likely than the likeliest by more than this factor are never amplified: their ratios are noise."""


def amplified(logit_BV: Tensor, other_BW: Tensor, amplification: float) -> Tensor:
    """log p + a (log p - log p') for logits of p and of p', up to a constant a row; -inf where p is not plausible.

    What a fine-tune made a little more likely everywhere then is said where nothing calls for it. Tokens that only p
    knows are left as they are. With a weaker model as p' it is contrastive decoding (Li et al. 2023, 2210.15097); a tune and
    its base are compared so in 2605.25902, where sampling recovers training text.
    """
    logp_BV = logit_BV.log_softmax(1)
    known = min(logit_BV.shape[1], other_BW.shape[1])
    rise_BV = torch.zeros_like(logp_BV)
    rise_BV[:, :known] = logp_BV[:, :known] - other_BW[:, :known].log_softmax(1)
    implausible_BV = logp_BV < logp_BV.max(1, keepdim=True).values + math.log(PLAUSIBLE)
    return (logp_BV + amplification * rise_BV).masked_fill(implausible_BV, float("-inf"))


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
