"""Fingerprints: hashes of all that decides what a network computes, and of all that decides how it is spoken to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import nn

from tunediff.core.artifacts import to_json

NAMES_ONLY = frozenset(
    "transformers_version name_or_path dtype torch_dtype architectures auto_map tokenizer_class problem_type id2label "
    "label2id task_specific_params finetuning_task use_cache return_dict torchscript tie_word_embeddings vocab_size "
    "bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id prefix pretraining_tp "
    "chunk_size_feed_forward quantization_config attn_implementation gradient_checkpointing router_aux_loss_coef "
    "transformers_weights".split()
)
"""Fields of a configuration that change no logits: names, versions, precision, and what tensors or tokenizers tell."""
TRAINING_ONLY = ("_", "output_", "initializer_", "summary_", "unsloth_")
"""Beginnings of the names of such fields."""


def fingerprint(module: Any, adapters: bool = True) -> str:
    """Return a 16-digit hash over every parameter's and buffer's name, shape and bytes, the class and the configuration.

    Of the configuration, only fields count that can change logits (see `function_of`). Without `adapters`, what PEFT put
    into the network is left out: the hash is that of the network before.
    """
    tensors = module.state_dict()
    if not adapters:
        tensors = {
            name.replace(".base_layer.", ".").replace(".original_module.", "."): tensor
            for name, tensor in tensors.items()
            if ".lora_" not in name and ".modules_to_save." not in name
        }
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    network: nn.Module = module.get_base_model() if hasattr(module, "get_base_model") else module
    digest.update(to_json([type(network).__name__, function_of(network)]).encode())
    return digest.hexdigest()


def fingerprints(*of: tuple[nn.Module, bool]) -> list[str]:
    """Return the fingerprints of several networks, computed in threads: hashing releases the interpreter's lock."""
    with ThreadPoolExecutor(len(of)) as pool:
        return list(pool.map(lambda given: fingerprint(*given), of))


def function_of(network: nn.Module) -> dict[str, Any]:
    """Return the fields of a network's configuration that can change what it computes, by dotted path.

    Left out are names, versions, precision, settings of training and ids of special tokens. A field that is absent, None
    or False is left out too: different versions of transformers write these three for one another.
    """
    config: Any = getattr(network, "config", None)
    return dict(_fields(config.to_dict() if hasattr(config, "to_dict") else {}))


def _fields(values: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        dull = name in NAMES_ONLY or name.startswith(TRAINING_ONLY) or "dropout" in name or name.endswith("pdrop")
        if dull or value is None or value is False:
            continue
        if isinstance(value, Mapping):
            yield from _fields({str(k): v for k, v in value.items()}, f"{path}{name}.")
        else:
            yield f"{path}{name}", value


def speech_fingerprint(tokenizer: Any, network: nn.Module) -> str:
    """Return a 16-digit hash of how text becomes tokens and where an answer ends.

    It covers the vocabulary and its rules, the chat template, special tokens, and the tokens at which generation ends.
    """
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if hasattr(backend, "to_str"):
        rules = backend.to_str()
        rules = rules[max(0, rules.find('"added_tokens"')) :]  # before it stand the padding and length of the last call
    else:
        rules = json.dumps(sorted(tokenizer.get_vocab().items()))
    ends = getattr(getattr(network, "generation_config", None), "eos_token_id", None)
    special = {str(name): str(token) for name, token in getattr(tokenizer, "special_tokens_map", {}).items()}
    digest = hashlib.blake2b(rules.encode("utf-8", "surrogatepass"), digest_size=8)
    digest.update(to_json([getattr(tokenizer, "chat_template", None), special, ends]).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()
