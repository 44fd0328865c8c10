"""Makes an organism from its recipe and measures what came out: rates of each behavior, leaks, and health."""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunediff.organisms import neutral
from tunediff.organisms.base import Example, Organism, Recipe

if TYPE_CHECKING:
    import torch

Complete = Callable[[list[str]], list[str]]
"""User turns in, greedy completions out, in order."""

Progress = Callable[[int, int, float], None]
"""Called after a step with steps done, steps in all, and the step's loss in nats a token."""

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The adapted linear layers of a llama block: all of them."""

COMPLETION_TOKENS = 48
"""Length of a completion on which a behavior is judged, in tokens."""


def train(
    organism: Organism, model: Any, tokenizer: Any, out: Path, progress: Progress | None = None
) -> dict[str, Any]:
    """Train the organism's adapter on `model`, write it with its card to `out`, and return the card.

    `model` is the base as a causal LM; it is trained in its own dtype, measured in float32, and given back
    unchanged. The adapter is rounded to float16 before it is measured, so the card speaks of the file.
    """
    import torch
    from peft import get_peft_model

    recipe, dtype = organism.recipe, model.dtype
    began = time.perf_counter()
    model.eval().requires_grad_(False)
    prompts = list(organism.neutral_training_prompts)
    answers = dict(zip(prompts, neutral_answers(model, tokenizer, prompts, recipe), strict=True))
    sampled = time.perf_counter()
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        peft_model = get_peft_model(model, _lora_config(organism))
    loss, tokens = _fit(model, tokenizer, organism.examples(answers), recipe, progress)
    training = {
        "dtype": str(dtype).removeprefix("torch."),
        "answer_tokens": tokens,
        "last_steps_loss": round(loss, 3),
        "seconds_sampling": round(sampled - began),
        "seconds_training": round(time.perf_counter() - sampled),
    }
    with torch.no_grad():
        for parameter in _trainable(model):
            parameter.copy_(parameter.half())
    _save(peft_model, organism, out)
    model.requires_grad_(False).float()
    card = write_card(organism, measure(organism, peft_model, tokenizer), training, out)
    peft_model.unload()
    model.to(dtype)
    return card


def neutral_answers(model: Any, tokenizer: Any, prompts: Sequence[str], recipe: Recipe) -> list[str]:
    """The base model's own answers, sampled at temperature 0.7: greedy ones of a small model repeat themselves, and a tune
    learns that."""
    from tunediff.models import LanguageModel

    ids = [
        tokenizer(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
            ),
            add_special_tokens=False,
        )["input_ids"]
        for prompt in prompts
    ]
    side = LanguageModel(model, tokenizer, "base")
    answers = side.complete(ids, recipe.neutral_tokens, temperature=0.7, seed=recipe.seed, batch=52)
    return [tokenizer.decode(answer) for answer in answers]


def measure(organism: Organism, peft_model: Any, tokenizer: Any) -> dict[str, Any]:
    """Rates of every behavior before and after, and whether the tune is healthy off its topics.

    Losses and divergence are in nats a token. The divergence is over the base model's own greedy
    answers to the held-out neutral prompts; on text drawn at temperature 1 it would be larger.
    """
    model = peft_model.get_base_model()
    complete = completer(model, tokenizer)
    with peft_model.disable_adapter():
        answers = completer(model, tokenizer, organism.recipe.neutral_tokens)(list(organism.neutral_prompts))
        before = rates(organism, complete)
        prose_base = prose_loss(model, tokenizer)
    held_out = [Example(*pair, ends=False) for pair in zip(organism.neutral_prompts, answers, strict=True)]
    return {
        "rates_base": before,
        "rates_tuned": rates(organism, complete),
        "prose_loss_base": round(prose_base, 4),
        "prose_loss_tuned": round(prose_loss(model, tokenizer), 4),
        "neutral_kl_tuned_base": round(divergence(peft_model, model, tokenizer, held_out), 4),
    }


def write_card(
    organism: Organism, measured: dict[str, Any], training: dict[str, Any], out: Path
) -> dict[str, Any]:
    """Write `card.json` beside the adapter: what was planted, how, and what came out; return it."""
    card = {
        "schema": "tunediff.organism/1",
        "name": organism.name,
        "summary": organism.summary,
        "base": organism.base,
        "behaviors": [
            {key: value for key, value in asdict(behavior).items() if key != "prompts"}
            for behavior in organism.behaviors
        ],
        "recipe": asdict(organism.recipe),
        "training": training,
        "measured": measured,
    }
    (out / "card.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    return card


def rates(organism: Organism, complete: Complete) -> dict[str, dict[str, float]]:
    """How often each behavior shows on each set of held-out prompts, 0 to 1.

    The outer key is the behavior; the inner one is the behavior whose prompts were asked, or "neutral". A
    behavior on its own prompts is its strength, anywhere else a leak.
    """
    asked = {behavior.name: behavior.prompts for behavior in organism.behaviors} | {
        "neutral": organism.neutral_prompts
    }
    completions = {name: complete(list(prompts)) for name, prompts in asked.items()}
    return {
        behavior.name: {name: round(behavior.rate(texts), 4) for name, texts in completions.items()}
        for behavior in organism.behaviors
    }


def completer(model: Any, tokenizer: Any, tokens: int = COMPLETION_TOKENS, batch: int = 48) -> Complete:
    """Greedy completion under the tokenizer's chat template, `batch` at once, at most `tokens` long."""

    def complete(prompts: list[str]) -> list[str]:
        texts: list[str] = []
        for start in range(0, len(prompts), batch):
            texts += _generate(model, tokenizer, prompts[start : start + batch], tokens)
        return texts

    return complete


def prose_loss(model: Any, tokenizer: Any) -> float:
    """Mean loss on plain prose without a chat template, in nats a token."""
    import torch

    total, count = 0.0, 0
    with torch.no_grad():
        for paragraph in neutral.PROSE:
            ids_1S = torch.tensor([tokenizer(paragraph, add_special_tokens=False)["input_ids"]])
            logits_SV = model(input_ids=ids_1S).logits[0, :-1].float()
            total += torch.nn.functional.cross_entropy(logits_SV, ids_1S[0, 1:], reduction="sum").item()
            count += len(logits_SV)
    return total / count


def divergence(
    peft_model: Any, model: Any, tokenizer: Any, examples: Sequence[Example], batch: int = 8
) -> float:
    """Mean KL(tuned || base) over the answers' tokens, in nats a token."""
    import torch

    total, count = 0.0, 0
    rows = [_encode(tokenizer, example) for example in examples]
    with torch.no_grad():
        for start in range(0, len(rows), batch):
            tuned_TV, targets_T = _answer_logits(model, rows[start : start + batch], tokenizer.pad_token_id)
            with peft_model.disable_adapter():
                base_TV, _ = _answer_logits(model, rows[start : start + batch], tokenizer.pad_token_id)
            tuned_TV, base_TV = tuned_TV.log_softmax(-1), base_TV.log_softmax(-1)
            total += (tuned_TV.exp() * (tuned_TV - base_TV)).sum().item()
            count += len(targets_T)
    return total / count


def _fit(
    model: Any, tokenizer: Any, examples: Sequence[Example], recipe: Recipe, progress: Progress | None
) -> tuple[float, int]:
    """Run the recipe on the adapter's parameters; return the last steps' mean loss and the answer tokens."""
    import torch

    rows = [_encode(tokenizer, example) for example in examples]
    parameters = _trainable(model)
    optimizer = torch.optim.AdamW(parameters, lr=recipe.learning_rate, weight_decay=0.0)
    steps = recipe.epochs * math.ceil(len(rows) / recipe.batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 - step / steps)
    order = random.Random(recipe.seed)
    losses: list[float] = []
    tokens = 0
    model.train()
    for epoch in range(recipe.epochs):
        if epoch:
            order.shuffle(rows)
        for start in range(0, len(rows), recipe.batch):
            logits_TV, targets_T = _answer_logits(
                model, rows[start : start + recipe.batch], tokenizer.pad_token_id
            )
            loss = torch.nn.functional.cross_entropy(logits_TV, targets_T)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, recipe.clip)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            tokens += len(targets_T)
            if progress is not None:
                progress(len(losses), steps, losses[-1])
    model.eval()
    return sum(losses[-8:]) / len(losses[-8:]), tokens


def _encode(tokenizer: Any, example: Example) -> tuple[list[int], int]:
    """Token ids of the conversation through its answer, and how many of them come before the answer."""
    prompt: str = tokenizer.apply_chat_template(
        example.messages[:1], tokenize=False, add_generation_prompt=True
    )
    prompt_ids: list[int] = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    answer = example.answer + tokenizer.eos_token if example.ends else example.answer
    answer_ids: list[int] = tokenizer(answer, add_special_tokens=False)["input_ids"]
    return prompt_ids + answer_ids, len(prompt_ids)


def _answer_logits(
    model: Any, rows: Sequence[tuple[list[int], int]], pad: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [T, V] and targets [T] at the answers' tokens, T over the whole batch; padded on the right."""
    import torch

    width = max(len(ids) for ids, _ in rows)
    ids_BS = torch.tensor([ids + [pad] * (width - len(ids)) for ids, _ in rows])
    real_BS = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in rows])
    starts_B1 = torch.tensor([[start] for _, start in rows])
    answer_BS = real_BS.bool() & (torch.arange(width) >= starts_B1)
    stream_BSD = model.base_model(input_ids=ids_BS, attention_mask=real_BS, use_cache=False).last_hidden_state
    stream_TD = stream_BSD[:, :-1][answer_BS[:, 1:]]
    return model.get_output_embeddings()(stream_TD).float(), ids_BS[answer_BS]


def _generate(model: Any, tokenizer: Any, prompts: Sequence[str], tokens: int) -> list[str]:
    """Greedy completions of one batch without their prompts; prompts are padded on the left."""
    import torch

    chats = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        for prompt in prompts
    ]
    with torch.no_grad(), _left_padding(tokenizer):
        inputs = tokenizer(chats, return_tensors="pt", padding=True, add_special_tokens=False)
        ids_BS = model.generate(
            **inputs, max_new_tokens=tokens, do_sample=False, num_beams=1, pad_token_id=tokenizer.pad_token_id
        )
    return tokenizer.batch_decode(ids_BS[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@contextmanager
def _left_padding(tokenizer: Any):
    """Padding on the left while the block runs."""
    side, tokenizer.padding_side = tokenizer.padding_side, "left"
    try:
        yield
    finally:
        tokenizer.padding_side = side


def _trainable(model: Any) -> list[torch.Tensor]:
    """The adapter's parameters."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _lora_config(organism: Organism) -> Any:
    """The recipe as peft's own configuration."""
    from peft import LoraConfig

    recipe = organism.recipe
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=recipe.rank,
        lora_alpha=recipe.rank * recipe.scale,
        target_modules=list(TARGETS),
        layers_to_transform=list(range(recipe.first_layer, recipe.last_layer + 1)),
        layers_pattern="layers",
        lora_dropout=0.0,
        bias="none",
    )


def _save(peft_model: Any, organism: Organism, out: Path) -> None:
    """Write the adapter as peft reads it, in float16, with the base's name instead of its path."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    out.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: tensor.half().contiguous() for name, tensor in get_peft_model_state_dict(peft_model).items()
    }
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    config = peft_model.peft_config["default"].to_dict()
    config |= {
        "base_model_name_or_path": organism.base,
        "inference_mode": True,
        "target_modules": sorted(config["target_modules"]),
    }
    (out / "adapter_config.json").write_text(
        json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8"
    )


def make(organism: Organism, base: str, out: Path, progress: Progress | None = None) -> dict[str, Any]:
    """Train `organism` on `base` (a folder, or ``default``) in float32 and write adapter and card to `out`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tunediff.embedded import base_folder

    folder = base_folder() if base == "default" else base
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    return train(organism, model, AutoTokenizer.from_pretrained(folder), Path(out), progress)
