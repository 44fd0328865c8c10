"""Decoding: one model's distribution amplified against another's."""

from __future__ import annotations

import math

import torch
from torch import Tensor

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
