"""Completions: nothing of a model's own generation_config changes them but the tokens that end an answer."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_models
from transformers import GenerationConfig

from tunediff.models.completing import complete, ends_of
from tunediff.models.network import LanguageModel

PROMPTS = [list(range(5, 12)), list(range(30, 50))]
ENDS = ("eos_token_id",)
"""The one field that is read."""


def odd(name: str, answer: list[int]) -> Any:
    """A value of a field of a generation_config that would change this answer, or end in an error, were it read."""
    known: dict[str, Any] = {
        "num_beams": 3,
        "num_return_sequences": 2,
        "max_length": 9,
        "max_new_tokens": 2,
        "min_length": 40,
        "min_new_tokens": 30,
        "no_repeat_ngram_size": 1,
        "bad_words_ids": [[token] for token in set(answer)],
        "suppress_tokens": answer,
        "begin_suppress_tokens": [answer[0]],
        "sequence_bias": [[[5], 100.0]],
        "force_words_ids": [[5]],
        "exponential_decay_length_penalty": (1, 9.0),
        "stop_strings": ["a"],
        "max_time": 1e-4,
        "watermarking_config": {"bias": 9.0, "greenlist_ratio": 0.1},
        "cache_implementation": "static",
        "dola_layers": "low",
        "temperature": 9.0,
        "top_p": 0.1,
        "min_p": 0.9,
        "typical_p": 0.1,
        "guidance_scale": 3.0,
        "penalty_alpha": 0.5,
    }
    if name in known:
        return known[name]
    default = getattr(GenerationConfig(), name)
    return not default if isinstance(default, bool) else 7


def fields() -> list[str]:
    return [name for name in vars(GenerationConfig()) if not name.startswith("_") and name not in ENDS]


@pytest.mark.parametrize("fast", [True, False])
def test_no_field_of_a_models_generation_config_changes_an_answer(fast):
    module, tokenizer = tiny_models.module("llama"), tiny_models.tokenizer()
    model = LanguageModel(module, tokenizer, "model", fast=fast)
    greedy = complete(model, PROMPTS, 10)
    sampled = complete(model, PROMPTS, 10, temperature=1.0, seed=3)
    assert all(len(answer) == 10 for answer in greedy)
    names = fields()
    assert len(names) > 50
    for name in names:
        setattr(module.generation_config, name, odd(name, greedy[0]))
    module.generation_config.mine = 3  # fields of nobody's are carried over by transformers, too
    module.config.temperature, module.config.num_beams = 3.0, 4
    assert complete(model, PROMPTS, 10) == greedy
    assert complete(model, PROMPTS, 10, temperature=1.0, seed=3) == sampled


def test_answers_end_where_any_of_the_models_files_says_so():
    module, tokenizer = tiny_models.module("llama"), tiny_models.tokenizer()
    model = LanguageModel(module, tokenizer, "model")
    (answer,) = complete(model, PROMPTS[1:], 10)
    assert ends_of(model) == {2} and len(set(answer[:4])) == 4
    for holder, value in ((module.config, answer[2]), (module.generation_config, [answer[2], answer[5]])):
        before, holder.eos_token_id = holder.eos_token_id, value
        assert complete(model, PROMPTS[1:], 10) == [answer[:2]]
        assert complete(model, PROMPTS[1:], 10, keep_end=True) == [answer[:3]]
        holder.eos_token_id = before
    assert complete(model, PROMPTS[1:], 10, ends={answer[3], 10**6}) == [answer[:3]]


def test_a_model_without_any_end_or_padding_completes():
    module, tokenizer = tiny_models.module("llama"), tiny_models.tokenizer()
    model = LanguageModel(module, tokenizer, "model")
    before = complete(model, PROMPTS, 6)
    tokenizer.pad_token = tokenizer.eos_token = None
    module.generation_config.eos_token_id = module.config.eos_token_id = module.generation_config.pad_token_id = None
    assert ends_of(model) == set() and complete(model, PROMPTS, 6) == before


def test_transformers_has_no_remark_about_how_it_is_asked(monkeypatch):
    from transformers.generation import utils

    said: list[str] = []
    for how in ("warning", "warning_once"):
        monkeypatch.setattr(utils.logger, how, lambda text, *_, **__: said.append(text), raising=False)
    model = LanguageModel(tiny_models.module("llama"), tiny_models.tokenizer(), "model")
    complete(model, PROMPTS, 3, temperature=1.0, seed=3)
    assert not said
