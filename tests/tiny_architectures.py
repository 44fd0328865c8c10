"""Make a tiny network of every decoder class that transformers registers: one generic recipe, and a table of exceptions."""

from __future__ import annotations

import copy
import json
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny_models
import torch

WIDTH, LAYERS, VOCABULARY = 32, 3, 300

SIZES: list[tuple[str, int | None]] = [
    # A field's name as a regular expression, and its value; the first that matches counts, None leaves the field alone.
    (r"num_experts_per_tok(en)?|(moe_)?top_?k(_experts)?|moe_k|num_selected_experts", 2),
    (r".*(?<!vocab)_token.*|.*_id|.*_index", None),
    (r".*vocab_size.*|n_tokens", VOCABULARY),
    (r".*num_(global_)?(key_value|kv)_heads", 2),
    (r"mamba_n_heads|(mamba_|linear_)num_(key_|value_)?heads|n_mamba_heads", 4),
    (r".*num_attention_heads|n_heads?|num_heads|(de|en)coder_attention_heads|num_query_heads", 4),
    (
        r"(num_)?(hidden|decoder|encoder)_layers|num_(decoder_|encoder_)?layers|n_layers?|decoder_layers|num_hidden_layers",
        LAYERS,
    ),
    (r"qk_rope_head_dim|qk_nope_head_dim|v_head_dim|index_head_dim|linear_(key_|value_)?head_dim", 8),
    (r"mamba_(d_head|head_dim|headdim)", 16),
    (r"qk_head_dim", None),
    (r".*head_(dim|size)|d_kv|kv_channels|rotary_dim", 8),
    (r".*_lora_(rank|dim)|.*_rank", 8),
    (r"hidden_size_per_layer_input", 8),
    (
        r"hidden_size|d_model|n_embd|dim|model_dim|embedding_size|word_embed_proj_dim|embed_dim|lru_width|emb_dim|hidden_size_global",
        WIDTH,
    ),
    (
        r".*(ffn|ff|intermediate|inner|mlp|feed_forward)_(size|dim|hidden_size)|d_ff|dff|n_inner|expert_dim|mamba_d_ssm",
        2 * WIDTH,
    ),
    (
        r".*max_position.*|n_positions|n_ctx|max_seq_len|context_length|max_sequence_length|max_(target|source)_positions",
        256,
    ),
    (r".*num_(local_|routed_)?experts|n_routed_experts|moe_num_experts", 4),
    (
        r"n_group|topk_group|num_expert_groups?|(n|num|moe_num)_shared_experts|first_k_dense_replace|num_dense_layers|num_kv_shared_layers",
        1,
    ),
    (r"mamba_(n_groups|ngroups)|n_groups", 1),
    (r".*(d_state|state_size)", 8),
    (r"time_step_rank|mamba_dt_rank", 4),
    (r".*chunk_size", 16),
    (r".*sliding_window(_size)?|.*window_size", 24),
    (r"index_topk", 256),
    (r"index_n_heads", 2),
]
"""What makes networks large."""

GAIN = {"mamba": 1.0}
"""What maps are multiplied by so that they matter; 4 where nothing is said."""

TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
"""Those of `tiny_models.tokenizer`."""

MLA = {"num_key_value_heads": 4}
SPECIAL: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        ["axk1", "axk2", "deepseek_v3", "deepseek_v32", "dots3_note_text", "glm4_moe_lite", "glm_moe_dsa"]
        + ["minicpm3", "sarvam_mla", "youtu"],
        MLA,
    ),
    **dict.fromkeys(["hunyuan_v1_dense", "hunyuan_v1_moe", "ministral"], {"head_dim": 8}),
    **dict.fromkeys(["bailing_hybrid", "kimi_linear"], MLA),
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "cpmant": {"dim_ff": 2 * WIDTH},
    "blt": {"encoder_hash_byte_group_vocab": 64, "max_position_embeddings": 256},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": WIDTH, "ffn_hidden_size": 2 * WIDTH, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": MLA | {"num_experts_per_tok": 2, "n_routed_experts": 4},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 1, "n_shared_experts": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "mamba2": {"head_dim": 16},
    "longcat_flash": MLA | {"zero_expert_num": 2},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 8},
    "qwen4_exp_text": {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 64}
    | {"indexer_compress_ratio": 8, "ngram_vocab_size_base": 64},
    "reformer": {
        "axial_pos_embds": False,
        "is_decoder": True,
        "local_attn_chunk_length": 16,
        "lsh_attn_chunk_length": 16,
    },
    "xlm": {"n_words": VOCABULARY, "causal": True, "n_heads": 4, "n_layers": LAYERS},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    **dict.fromkeys(
        ["zamba", "zamba2"],
        {"layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "num_hidden_layers": 4, "num_key_value_heads": 4}
        | {"attention_hidden_size": 2 * WIDTH, "attention_head_dim": 16},
    ),
    "zaya": {"num_experts_per_tok": 1},
}
"""What the recipe does not know, by model type."""


def names() -> list[str]:
    """The model types under which transformers registers a class for causal language modeling."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


@dataclass(frozen=True)
class Case:
    """One network to build: a model type, the auto class that makes it, and fields other than the recipe's."""

    type: str
    auto: str = "AutoModelForCausalLM"
    fields: tuple[tuple[str, Any], ...] = ()


WRAPPERS = (
    "idefics3",
    "internvl",
    "llava",
    "llava_next",
    "mistral3",
    "paligemma",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
)
"""Model types of wrappers that read images too, and are not registered for causal language modeling."""

OTHERS = {
    "OPTForCausalLM, embeddings narrower than the stream": Case(
        "opt", fields=(("word_embed_proj_dim", WIDTH // 2), ("do_layer_norm_before", False))
    ),
    "GPT2LMHeadModel, fewer positions than a row": Case("gpt2", fields=(("n_positions", 64),)),
    "BertLMHeadModel, as an encoder": Case("bert", fields=(("is_decoder", False),)),
    "Gemma2ForCausalLM, window shorter than a row": Case("gemma2", fields=(("sliding_window", 8),)),
}
"""Networks of a class whose configuration makes them another sort."""


def cases() -> dict[str, Case]:
    """A network of each class, by the class's name, under the first model type that it is registered for; and some more."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )

    found: dict[str, Case] = dict(OTHERS)
    for name in names():
        found.setdefault(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name], Case(name))
    for name in WRAPPERS:
        if name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
            found.setdefault(
                MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[name], Case(name, "AutoModelForImageTextToText")
            )
    return dict(sorted(found.items(), key=lambda item: item[0].lower()))


def _size(name: str) -> int | None:
    return next((size for pattern, size in SIZES if re.fullmatch(pattern, name)), None)


def small(config: Any) -> dict[str, Any]:
    """The fields that make a default configuration's network tiny, with one layer of each sort that it has."""
    fields: dict[str, Any] = {}
    for name, value in vars(config).items():
        size = _size(name)
        if size is not None and isinstance(value, int) and not isinstance(value, bool) and value > 0:
            fields[name] = size
    fields |= {name: value for name, value in TOKENS.items() if hasattr(config, name)}
    fields |= {name: True for name in ("is_decoder",) if hasattr(config, name)}  # of BERT and its like
    fields |= sorts_of_layers(config, fields)
    for name in getattr(config, "sub_configs", {}):
        part = getattr(config, name, None)
        if part is not None:
            fields[name] = type(part)(**small(part))
    return fields | SPECIAL.get(config.model_type, {})


def sorts_of_layers(config: Any, fields: dict[str, Any]) -> dict[str, Any]:
    """Lists with an entry for each layer, cut to layers that differ in them, in the order of the network."""
    counts = [n for n in fields if fields[n] == LAYERS and isinstance(getattr(config, n), int)]
    depth = max((getattr(config, n) for n in counts), default=0)
    lists = {n: v for n, v in vars(config).items() if isinstance(v, (list, tuple)) and len(v) == depth > 0}
    if not lists:
        return {}
    rows = list(zip(*lists.values()))
    chosen = sorted({rows.index(row): None for row in rows})
    chosen = chosen[:6] if len(chosen) >= 2 else [0]
    while len(chosen) < LAYERS:
        chosen.append(chosen[-1])
    cut: dict[str, Any] = {
        name: [_size(name) if isinstance(value[i], int) and _size(name) else value[i] for i in chosen]
        for name, value in lists.items()
    }
    return cut | {n: len(chosen) for n in counts}


def config(case: Case) -> Any:
    """The tiny configuration of a network."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = CONFIG_MAPPING[case.type]
    return kind(**{**small(kind()), **SPECIAL.get(case.type, {}), **dict(case.fields)})


def network(case: Case, seed: int = 0) -> torch.nn.Module:
    """A tiny random network, its maps large enough to matter; raises what transformers raises."""
    import transformers

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = getattr(transformers, case.auto).from_config(config(case), dtype=torch.float32).eval()
        with torch.no_grad():
            for parameter in made.parameters():
                if parameter.dim() >= 2:
                    parameter.mul_(GAIN.get(case.type, 4.0))
    if getattr(made, "generation_config", None) is not None:
        made.generation_config.pad_token_id = 0
    return made


def tuned(made: torch.nn.Module, size: float = 0.05, seed: int = 1) -> torch.nn.Module:
    """A copy of a network with a random change, of `size` times the parameter's norm, in all but embeddings and vectors."""
    other, rng = copy.deepcopy(made), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if parameter.dim() >= 2 and not any(part in name for part in ("emb", "wte", "wpe", "lm_head")):
                noise = torch.randn(parameter.shape, generator=rng)
                parameter.add_(noise * (size * parameter.norm() / noise.norm().clamp_min(1e-9)))
    return other


@dataclass(frozen=True)
class Outcome:
    """What became of a whole diff of one class.

    state    "works", "refused" (by tunediff, with its reason) or "not built" (by transformers, with its error)
    reason   why it is refused or not built; empty where it works
    reach    share of the difference in parameters that edits reach
    shares   whether rows share the run of a prefix
    resumes  whether passes begin above blocks without running them
    """

    state: str
    reason: str = ""
    reach: float = 0.0
    shares: bool = False
    resumes: bool = False


SETTINGS: dict[str, dict[str, Any]] = {
    "contrast": {"prompts": 3, "pool": 3, "tokens": 4},
    "elicit": {"questions": 0},
    "corpus": {"row_tokens": 32, "tokens": 600},
    "find": {"finders": ["mean_difference", "principal"], "candidates": 2, "signals": []},
    "scan": {"depths": 1, "tokens": 100},
    "rank": {"nulls": 3, "null_tokens": 100, "effect_tokens": 100, "level": 1.0},
    "verify": {"draws": 5, "changes": 1, "level": 0.9},
    "edit": {"tokens": 200},
}


def corpus(folder: Path) -> dict[str, list[str]]:
    """Write a few short texts and prompts, and return the settings that name them."""
    rng = random.Random(0)
    texts = ["".join(rng.choice("ABCDabcdefghijklmnop") for _ in range(30)) for _ in range(24)]
    (folder / "corpus.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    chats = [{"messages": [{"role": "user", "content": text[:5]}]} for text in texts[:8]]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, chats)))
    return {"paths": [str(folder / "corpus.jsonl")], "prompts": [str(folder / "prompts.jsonl")]}


def outcome(case: Case, folder: Path) -> Outcome:
    """What becomes of a whole diff of two tiny networks, with an edit that is billed and baked.

    Raises whatever is neither a refusal nor the failure of transformers itself to run the network.
    """
    import tunediff
    from tunediff.core.errors import TunediffError

    try:
        made = network(case)
        with torch.inference_mode():
            made(input_ids=torch.arange(3, 20)[None], use_cache=False)
    except Exception as fault:  # of whatever kind: there is nothing to run
        return Outcome("not built", _line(fault))
    base, other = (tiny_models.save(folder / side, one) for side, one in (("base", made), ("tuned", tuned(made))))
    settings = {**SETTINGS, "corpus": SETTINGS["corpus"] | corpus(folder)}
    try:
        found = tunediff.diff(base, other, runs=folder / "runs", undo=False, **settings)
        edit = found.edit([found.changes[0].id])
        bill = tunediff.revert(found, [found.changes[0].id], bake=folder / "baked")
    except TunediffError as fault:
        return Outcome("refused", _line(fault, folder))
    assert bill.measures and (folder / "baked" / "config.json").is_file()
    pair = found.run.pair
    reached = {id(parameter) for parameter in edit.parameters(pair.tuned)}
    norms = [(delta.norm**2, id(delta.parameter) in reached) for delta in pair.deltas()]
    reach = sum(norm for norm, inside in norms if inside) / sum(norm for norm, _ in norms)
    return Outcome("works", "", reach, pair.tuned.shares_prefixes, pair.tuned.resumes)


def _line(fault: Exception, *folders: Path) -> str:
    """What an error says and what it got, in a line that is the same in every folder."""
    text = str(fault).strip() or type(fault).__name__
    for folder in folders:
        text = text.replace(f"{folder}/", "")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    got = next((line for line in lines[1:] if line.startswith(("got:", "ValueError:"))), "")
    return f"{lines[0]}; {got}" if got else lines[0]
