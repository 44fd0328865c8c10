"""Any decoder-only Hugging Face causal language model, by its structure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tunediff.core.errors import FamilyError
from tunediff.models.families.base import Family
from tunediff.models.maps import Layout, Seen
from tunediff.models.passes import cached

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from torch import Tensor, nn

ATTENTION_NAMES = ("self_attn", "attn", "attention", "self_attention")
MLP_NAMES = ("mlp", "feed_forward", "ffn", "block_sparse_moe")


class HuggingFace(Family):
    """Blocks are the one ModuleList as long as the config says there are layers; the rest is asked of the model."""

    def matches(self, module: Any) -> bool:
        return hasattr(module, "config") and hasattr(module, "get_output_embeddings")

    def blocks(self, module: Any) -> nn.ModuleList:
        from torch import nn

        config = module.config.get_text_config(decoder=True)
        depth = config.num_hidden_layers
        lists = [
            (name, child)
            for name, child in module.named_modules()
            if isinstance(child, nn.ModuleList) and len(child) == depth
        ]
        # A list inside a block (experts, say) may happen to have the same length: the outermost is the stack.
        shallowest = min((name.count(".") for name, _ in lists), default=0)
        stacks = [child for name, child in lists if name.count(".") == shallowest]
        if len(stacks) != 1:
            raise FamilyError(
                f"the blocks of {type(module).__name__} cannot be told by structure",
                expected=f"one ModuleList of {depth} blocks",
                got=f"{len(stacks)} such lists",
                remedy="add a file to families/ for this network",
            )
        return stacks[0]

    def part(self, block: nn.Module, kind: str) -> Any:
        for name in ATTENTION_NAMES if kind == "attn" else MLP_NAMES:
            if hasattr(block, name):
                return getattr(block, name)
        raise FamilyError(
            f"{type(block).__name__} has no {kind} submodule",
            expected="one of " + ", ".join(ATTENTION_NAMES if kind == "attn" else MLP_NAMES),
            remedy="a resid site",
        )

    def unembedding(self, module: Any) -> Any:
        head = module.get_output_embeddings()
        if head is None:
            raise FamilyError(f"{type(module).__name__} has no unembedding", expected="a causal language model")
        return head

    def scaled_logits(self, module: Any, logits: Tensor) -> Tensor:
        config = module.config.get_text_config(decoder=True)
        if getattr(config, "logits_scaling", None):  # Granite divides
            logits = logits / config.logits_scaling
        if getattr(config, "logit_scale", None):  # Cohere multiplies
            logits = logits * config.logit_scale
        cap = getattr(config, "final_logit_softcapping", None)  # Gemma 2
        return (logits / cap).tanh() * cap if cap else logits

    def window(self, module: Any) -> float:
        return getattr(module.config.get_text_config(decoder=True), "sliding_window", None) or float("inf")

    def maps(self, module: Any) -> Mapping[str, Layout]:
        if not _keeps_experts(module):
            return super().maps(module)
        layout = Layout(module.is_transposed, module.down_proj.shape[0])
        return {_first(module): layout, "down_proj": layout}

    def reads(self, module: Any, given: Sequence[Any], named: Mapping[str, Any]) -> Iterable[Seen]:
        return _routed(module, given, named) if _keeps_experts(module) else super().reads(module, given, named)

    def cache(self, module: Any) -> Any:
        from transformers import DynamicCache
        from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

        cache = DynamicCache(config=module.config)
        # States of other kinds (of state space models, of compressed keys) hold more than what a position puts out.
        plain = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers)
        return cache if plain and cached(module, cache) else None


def _keeps_experts(module: Any) -> bool:
    """Whether a module keeps all experts of a block by transformers' interface for them: one stack before the activation,
    one behind it.
    """
    return hasattr(module, "_apply_gate") and hasattr(module, "is_transposed") and hasattr(module, "down_proj")


def _first(experts: Any) -> str:
    return "gate_up_proj" if experts.has_gate else "up_proj"


def _routed(experts: Any, given: Sequence[Any], named: Mapping[str, Any]) -> Iterator[Seen]:
    """What each expert reads: the states of the tokens routed to it, and what its own first map makes of them."""
    from torch.nn.functional import linear

    x_NI, chosen_NK = (*given, *named.values())[:2]
    first = _first(experts)
    maps = Layout(experts.is_transposed, experts.down_proj.shape[0]).maps(getattr(experts, first).data)
    for number, map_OI in enumerate(maps):
        at_N = (chosen_NK == number).any(-1).nonzero()[:, 0]
        if not len(at_N):
            continue
        read_NI = x_NI[at_N]
        yield Seen(first, read_NI, number, at_N)
        made_NO = linear(read_NI, map_OI, getattr(experts, f"{first}_bias")[number] if experts.has_bias else None)
        yield Seen(
            "down_proj", experts._apply_gate(made_NO) if experts.has_gate else experts.act_fn(made_NO), number, at_N
        )


VARIANT = HuggingFace
