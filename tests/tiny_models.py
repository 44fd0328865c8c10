"""Make tiny random models of many families, their fine-tunes and a tiny tokenizer on disk for tests."""

from __future__ import annotations

from pathlib import Path

import torch

SMALL = dict(
    vocab_size=300,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=64,
    max_position_embeddings=128,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)


def configs() -> dict:
    """A small config of each family, by its name."""
    import transformers as t

    kv = dict(num_key_value_heads=2)
    return {
        "llama": t.LlamaConfig(**SMALL, **kv),
        "qwen2": t.Qwen2Config(**SMALL, **kv),
        "qwen3": t.Qwen3Config(**SMALL, **kv, head_dim=8),
        "gemma2": t.Gemma2Config(**SMALL, **kv, head_dim=8, final_logit_softcapping=5.0),
        "gemma3": t.Gemma3TextConfig(**SMALL, **kv, head_dim=8),
        "mistral": t.MistralConfig(**SMALL, **kv),
        "phi": t.PhiConfig(**SMALL),
        "gpt2": t.GPT2Config(
            vocab_size=300,
            n_embd=32,
            n_layer=3,
            n_head=4,
            n_positions=128,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        ),
        "gpt_neox": t.GPTNeoXConfig(**SMALL),
        "opt": t.OPTConfig(
            vocab_size=300,
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            ffn_dim=64,
            max_position_embeddings=128,
            word_embed_proj_dim=32,
            pad_token_id=0,
        ),
        "olmo2": t.Olmo2Config(**SMALL),
    }


def module(family: str, seed: int = 0) -> torch.nn.Module:
    """A tiny random network with weights large enough that its layers matter."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = AutoModelForCausalLM.from_config(configs()[family], dtype=torch.float32).eval()
        with torch.no_grad():
            for parameter in network.parameters():
                if parameter.dim() == 2:
                    parameter.mul_(4.0)
    network.generation_config.pad_token_id = 0
    return network


def tokenizer():
    """A byte-level tokenizer of 300 entries with a chat template, made here."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    fast.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    return fast


def save(folder: Path, network: torch.nn.Module, tok=None) -> str:
    """Write a model folder and return its path as a string."""
    network.save_pretrained(folder)
    (tok or tokenizer()).save_pretrained(folder)
    return str(folder)


def tuned_copy(network: torch.nn.Module, size: float = 0.05, seed: int = 1) -> torch.nn.Module:
    """A copy whose block weights moved by `size` of their own norm in random directions."""
    import copy

    other = copy.deepcopy(network)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if parameter.dim() == 2 and "emb" not in name and "wte" not in name and "wpe" not in name:
                noise = torch.randn(parameter.shape, generator=rng)
                parameter.add_(noise * (size * parameter.norm() / noise.norm()))
    return other


def adapter(folder: Path, network: torch.nn.Module, seed: int = 2, zero: bool = False) -> str:
    """A random LoRA adapter over every linear map of `network`'s blocks, saved as PEFT does."""
    import copy

    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        wrapped = get_peft_model(copy.deepcopy(network), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
        if not zero:
            with torch.no_grad():
                for name, parameter in wrapped.named_parameters():
                    if "lora_B" in name:
                        parameter.normal_(std=0.05)
        wrapped.save_pretrained(folder)
    return str(folder)


def permuted(made, moved: torch.nn.Module, seed: int = 3):
    """A tokenizer and a network whose tokens are the same, under other ids."""
    import copy
    import json

    from tokenizers import Tokenizer

    plain = json.loads(made.backend_tokenizer.to_str())
    vocabulary = plain["model"]["vocab"]
    order = torch.randperm(256, generator=torch.Generator().manual_seed(seed)) + 3
    new_of = torch.cat([torch.arange(3), order, torch.arange(259, moved.config.vocab_size)])
    plain["model"]["vocab"] = {token: int(new_of[id]) for token, id in vocabulary.items()}
    made._tokenizer = Tokenizer.from_str(json.dumps(plain))
    moved = copy.deepcopy(moved)
    for weight in {moved.get_input_embeddings().weight, moved.get_output_embeddings().weight}:
        weight.data = weight.data[torch.argsort(new_of)].clone()
    return made, moved
