"""Decoding: one model's distribution amplified against another's, and tokens drawn from one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tunediff.core.errors import NumericsError

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


def drawn(score_BV: Tensor, uniform_B: Tensor, temperature: float) -> Tensor:
    """A token for each row (B,) from softmax(score / temperature): the first at which the sum of probabilities exceeds the row's
    uniform number in [0, 1). One number a row makes an answer that does not hang on what is answered beside it, and on a
    vocabulary of 49,152 is ten times as fast as torch.multinomial, which draws one for every token."""
    sum_BV = (score_BV.float() / temperature).softmax(1).cumsum(1)
    all_B = sum_BV[:, -1]
    if not all_B.isfinite().all():
        raise NumericsError(
            "scores give no probabilities to draw from",
            expected="a finite score in every row",
            got="NaN or infinity",
            remedy="--set pair.dtype=float32, or a higher temperature",
        )
    past_B = torch.minimum(uniform_B.to(all_B) * all_B, torch.nextafter(all_B, torch.zeros_like(all_B)))
    return torch.searchsorted(sum_BV, past_B[:, None], right=True)[:, 0]


def sampler(temperature: float, streams: Sequence[torch.Generator], tokens: int) -> Callable[[Tensor, Tensor], Tensor]:
    """A processor of scores (B, V) that leaves one token a row, for `tokens` steps at most; each row draws from its own stream."""
    turns = iter(torch.stack([torch.rand(tokens, generator=stream) for stream in streams], 1))

    def only(ids_BT: Tensor, score_BV: Tensor) -> Tensor:
        token_B = drawn(score_BV, next(turns).to(score_BV.device), temperature)
        return torch.full_like(score_BV, float("-inf")).scatter(1, token_B[:, None], 0.0)

    return only
