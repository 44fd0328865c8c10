"""Any decoder-only Hugging Face causal language model, by its structure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tunediff.core.errors import FamilyError
from tunediff.models.families._experts import way_of
from tunediff.models.families.base import Family
from tunediff.models.maps import Layout, Seen
from tunediff.models.passes import OTHER_NETWORK, cached

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch import Tensor, nn

DEPTHS = ("num_hidden_layers", "num_layers", "decoder_layers")
"""What configurations call their number of blocks."""
ATTENTION_NAMES = ("self_attn", "attn", "attention", "self_attention")
MLP_NAMES = ("mlp", "feed_forward", "ffn", "block_sparse_moe")


class HuggingFace(Family):
    """Blocks are the one ModuleList as long as the config says there are layers; the rest is asked of the model."""

    def matches(self, module: Any) -> bool:
        return hasattr(module, "config") and hasattr(module, "get_output_embeddings")

    def blocks(self, module: Any) -> nn.ModuleList:
        from torch import nn

        config = module.config.get_text_config(decoder=True)
        depths = {depth for name in DEPTHS if (depth := getattr(config, name, None)) is not None}
        decoder = module.get_decoder() if hasattr(module, "get_decoder") else None  # of a wrapper, its language model
        lists: list[tuple[str, nn.ModuleList]] = []
        for within in (decoder, module):
            if isinstance(within, nn.Module) and not lists:
                named = within.named_modules()
                lists = [(n, m) for n, m in named if isinstance(m, nn.ModuleList) and len(m) in depths]
        # A list inside a block (experts, say) may happen to have the same length: the outermost is the stack.
        shallowest = min((name.count(".") for name, _ in lists), default=0)
        stacks = [child for name, child in lists if name.count(".") == shallowest]
        if len(stacks) != 1:
            raise FamilyError(
                f"the blocks of {type(module).__name__} cannot be told by structure",
                expected=f"one list of {' or '.join(map(str, sorted(depths))) or 'as many'} blocks as config.json says",
                got=f"{len(stacks)} such lists",
                remedy=OTHER_NETWORK,
            )
        return stacks[0]

    def part(self, block: nn.Module, kind: str) -> Any:
        for name in ATTENTION_NAMES if kind == "attn" else MLP_NAMES:
            if hasattr(block, name):
                return getattr(block, name)
        raise FamilyError(
            f"{type(block).__name__} has no {kind} submodule",
            expected="one of " + ", ".join(ATTENTION_NAMES if kind == "attn" else MLP_NAMES),
            remedy="--set scan.sites=resid.1",
        )

    def unembedding(self, module: Any) -> Any:
        head = module.get_output_embeddings()
        if head is None:
            raise FamilyError(
                f"{type(module).__name__} has no unembedding", expected="a causal language model", remedy=OTHER_NETWORK
            )
        return head

    def scaled_logits(self, module: Any, logits: Tensor) -> Tensor:
        config = module.config.get_text_config(decoder=True)
        if (
            getattr(config, "logits_scaling", None) and config.model_type != "minicpm3"
        ):  # Granite divides; that one the state
            logits = logits / config.logits_scaling
        if getattr(config, "logit_scale", None):  # Cohere multiplies
            logits = logits * config.logit_scale
        cap = getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None)  # Gemma
        return (logits / cap).tanh() * cap if cap else logits

    def window(self, module: Any) -> float:
        return getattr(module.config.get_text_config(decoder=True), "sliding_window", None) or float("inf")

    def positions(self, module: Any) -> float:
        from torch import nn

        most = getattr(module.config.get_text_config(decoder=True), "max_position_embeddings", None) or float("inf")
        # In RoBERTa and its like, padding has a position too, and counting begins after it.
        for name, table in module.named_modules():
            if isinstance(table, nn.Embedding) and "position" in name and table.padding_idx is not None:
                most = min(most, table.num_embeddings - table.padding_idx - 1)
        return float(most)

    def maps(self, module: Any) -> Mapping[str, Layout]:
        way = way_of(module)
        return way.maps(module) if way else super().maps(module)

    def reads(self, module: Any, given: Sequence[Any], named: Mapping[str, Any]) -> Iterable[Seen]:
        way = way_of(module)
        return way.reads(module, (*given, *named.values())) if way else super().reads(module, given, named)

    def cache(self, module: Any) -> Any:
        from transformers import DynamicCache
        from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

        cache = DynamicCache(config=module.config)
        # States of other kinds (of state space models, of compressed keys) hold more than what a position puts out.
        plain = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers)
        return cache if plain and cached(module, cache) else None


VARIANT = HuggingFace
