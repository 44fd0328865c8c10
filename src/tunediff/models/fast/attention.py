"""Attention on the CPU: plain products over short rows, torch's fused kernel over long ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tunediff.kernels.matmuls import precision

NAME = "tunediff"
"""The name under which transformers knows this attention."""
SHORT = 160
"""Most keys for which plain products are faster than the fused kernel (measured: a third at 64 keys, nothing at 166)."""


@contextmanager
def attending(network: nn.Module) -> Iterator[None]:
    """While inside, a network that uses torch's fused attention on the CPU uses `_attend`; others are left alone.

    Only the name by which its configurations choose an attention changes.
    """
    if not _attends_by_torch(network):
        yield
        return
    from transformers import AttentionInterface, PreTrainedModel
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    before = [
        (config, config._attn_implementation_internal)
        for model in network.modules()
        if isinstance(model, PreTrainedModel)
        for config in _with_parts(model.config)
    ]
    capped = getattr(network.config.get_text_config(decoder=True), "attn_logit_softcapping", None)
    network.set_attn_implementation("eager" if capped else NAME)  # the fused kernel of older transformers drops the cap
    try:
        yield
    finally:
        for config, name in before:
            config._attn_implementation_internal = name


def _attends_by_torch(network: nn.Module) -> bool:
    config = getattr(network, "config", None)
    decoder = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else None
    on_cpu = next(network.parameters()).device.type == "cpu"
    return getattr(decoder, "_attn_implementation", None) == "sdpa" and on_cpu


def _with_parts(config: Any) -> Iterator[Any]:
    """A configuration and those within it."""
    yield config
    for name in config.sub_configs:
        if getattr(config, name, None) is not None:
            yield from _with_parts(getattr(config, name))


def _attend(
    module: nn.Module,
    q_BHTE: Tensor,
    k_BGSE: Tensor,
    v_BGSE: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **named: Any,
) -> tuple[Tensor, None]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    mask = attention_mask  # networks call it by its name
    (B, H, T, E), (G, S) = q_BHTE.shape, k_BGSE.shape[1:3]
    if S > SHORT or torch.is_grad_enabled() or not _is_plain(module, q_BHTE, S, mask, named):
        # The library that is faster for large products is up to five times slower for the fused kernel's small ones.
        with precision("highest"):
            return sdpa_attention_forward(module, q_BHTE, k_BGSE, v_BGSE, mask, scaling=scaling, **named)
    # Heads that share keys are rows of one product.
    q_XRE = (q_BHTE * (E**-0.5 if scaling is None else scaling)).reshape(B * G, -1, E)
    score_BGRTS = (q_XRE @ k_BGSE.flatten(0, 1).transpose(1, 2)).view(B, G, -1, T, S)
    least = torch.finfo(score_BGRTS.dtype).min
    if mask is None and T > 1:
        score_BGRTS += torch.full((T, S), least, dtype=score_BGRTS.dtype).triu_(1)
    elif mask is not None and mask.dtype == torch.bool:
        score_BGRTS.masked_fill_(~mask[:, :, None], least)
    elif mask is not None:
        score_BGRTS += mask[:, :, None]
    out_XRE = score_BGRTS.softmax(-1).view(B * G, -1, S) @ v_BGSE.flatten(0, 1)
    return out_XRE.view(B, H, T, -1).transpose(1, 2).contiguous(), None


def _is_plain(module: nn.Module, q_BHTE: Tensor, S: int, mask: Tensor | None, named: dict[str, Any]) -> bool:
    """Whether attention is a softmax of products under a mask that all heads share, or under the causal one."""
    if q_BHTE.device.type != "cpu" or any(
        named.get(name) is not None for name in ("softcap", "s_aux", "position_bias", "cache")
    ):
        return False
    if named.get("dropout"):
        return False
    if mask is not None:
        return (mask.shape[1], mask.shape[-1]) == (1, S)
    causal = named.get("is_causal")
    return q_BHTE.shape[2] == 1 or (
        q_BHTE.shape[2] == S and (getattr(module, "is_causal", True) if causal is None else causal)
    )
