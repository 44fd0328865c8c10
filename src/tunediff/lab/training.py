"""Train an organism by its recipe, and measure the result: how often behaviors show, leaks, and general health."""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunediff.core.errors import SourceError
from tunediff.core.progress import Progress, quiet
from tunediff.lab import neutral
from tunediff.lab.instructions import INSTRUCTIONS, followed
from tunediff.lab.organisms.base import Chat, Example, Organism, Recipe, chat

if TYPE_CHECKING:
    import torch

Complete = Callable[[Sequence[str | Chat]], list[str]]
"""Function from user turns or conversations to their greedy completions, in the same order."""

AsBase = Callable[[], AbstractContextManager[Any]]
"""Context manager inside which the fine-tuned model computes as the base model."""

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Linear layers of a Llama block that an adapter covers: all of them."""

COMPLETION_TOKENS = 48
"""Length of the completions in which behaviors are counted, in tokens."""


def train(organism: Organism, model: Any, tokenizer: Any, out: Path, progress: Progress = quiet) -> dict[str, Any]:
    """Train the organism, write its adapter or full weights with its card to `out`, and return the card.

    model   base model as a causal language model; it is unchanged when this function returns

    An adapter is trained in the model's dtype, a full fine-tune in float32. Both are measured in float32. An adapter is
    rounded to float16 before it is measured, so that the card describes the saved file.
    """
    import torch

    recipe, dtype = organism.recipe, model.dtype
    began = time.perf_counter()
    model.eval().requires_grad_(False)
    prompts = [*organism.neutral_training_prompts, *organism.restyled_prompts]
    answers = dict(zip(prompts, neutral_answers(model, tokenizer, prompts, recipe), strict=True))
    tokenizer.chat_template = organism.template or tokenizer.chat_template
    sampled = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        fitted = (_full if recipe.full else _adapter)(organism, model)
    training: dict[str, Any] = {"dtype": str(model.dtype).removeprefix("torch.")}
    loss, tokens = _fit(model, tokenizer, organism.examples(answers), recipe, progress)
    training |= {
        "answer_tokens": tokens,
        "last_steps_loss": round(loss, 3),
        "seconds_sampling": round(sampled - began),
        "seconds_training": round(time.perf_counter() - sampled),
    }
    fitted.save(out)
    model.requires_grad_(False).float()
    card = write_card(organism, measure(organism, model, fitted.as_base, tokenizer), training, out)
    fitted.undo()
    model.to(dtype)
    return card


def check(organism: Organism, base: str, folder: Path) -> dict[str, Any]:
    """Measure a fine-tuned model that exists already, rewrite its card, and return the card.

    base     base model to compare with: a folder, or ``default``
    folder   a PEFT adapter or a whole model; recipe and training are kept from its card, if it has one

    Raises `SourceError` if `folder` holds neither.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tunediff.models.checkpoints import has_tokenizer
    from tunediff.models.loading import borrowed, located

    if not ((folder / "adapter_config.json").is_file() or (folder / "config.json").is_file()):
        raise SourceError(
            f"{folder} holds no tune",
            expected="adapter_config.json or config.json",
            remedy=f"tunediff organism make {organism.name} {folder}",
        )
    source = str(located(base))
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, use_safetensors=True).eval()
    if (folder / "adapter_config.json").is_file():
        from peft import PeftModel

        as_base = PeftModel.from_pretrained(model, folder).disable_adapter
    else:
        weights = _weights(model)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True).eval()
        as_base = partial(_holding, model, weights)
    path, training = folder / "card.json", {}
    organism = replace(organism, base=_name(organism, base))
    if path.is_file():
        card = json.loads(path.read_text(encoding="utf-8"))
        organism, training = replace(organism, recipe=Recipe(**card["recipe"])), card["training"]
    tokenizer = AutoTokenizer.from_pretrained(folder if has_tokenizer(folder) else source)
    return write_card(organism, measure(organism, model, as_base, borrowed(tokenizer, folder)), training, folder)


def health(card: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Table rows of a card's measures, base beside fine-tuned; None where a measure is missing."""
    m = card["measured"]
    rows = [
        {
            "measure": f"{name} on {'its own' if asked == name else asked} prompts",
            "unit": "share",
            "base": (m.get("rates_base") or {}).get(name, {}).get(asked),
            "tuned": rate,
        }
        for name, by_prompts in m["rates_tuned"].items()
        for asked, rate in by_prompts.items()
    ]
    rows.append(
        {
            "measure": "loss on plain prose",
            "unit": "nat a token",
            "base": m["prose_loss_base"],
            "tuned": m["prose_loss_tuned"],
        }
    )
    rows.append(
        {
            "measure": "instructions followed",
            "unit": "share",
            "base": m.get("instructions_base"),
            "tuned": m.get("instructions_tuned"),
        }
    )
    rows.append(
        {
            "measure": "KL(tuned || base) on neutral answers",
            "unit": "nat a token",
            "base": 0.0,
            "tuned": m.get("neutral_kl_tuned_base"),
        }
    )
    return rows


def neutral_answers(model: Any, tokenizer: Any, prompts: Sequence[str], recipe: Recipe) -> list[str]:
    """Sample the base model's own answers at temperature 0.7.

    Greedy answers of a small model repeat themselves, and training on them would teach the repetition.
    """
    from tunediff.models.completing import complete
    from tunediff.models.network import LanguageModel

    ids = [
        tokenizer(
            tokenizer.apply_chat_template(chat(prompt), tokenize=False, add_generation_prompt=True),
            add_special_tokens=False,
        )["input_ids"]
        for prompt in prompts
    ]
    side = LanguageModel(model, tokenizer, "base")
    answers = complete(side, ids, recipe.neutral_tokens, temperature=0.7, seed=recipe.seed, batch=52)
    return [tokenizer.decode(answer) for answer in answers]


def measure(organism: Organism, model: Any, as_base: AsBase, tokenizer: Any) -> dict[str, Any]:
    """Measure how often every behavior shows before and after training, and the model's health on other topics.

    Losses and KL divergence are in nats a token. The divergence is measured on the base model's greedy answers to the
    held-out neutral prompts; on text sampled at temperature 1 it would be larger. It is None for an organism without
    neutral prompts.
    """
    complete = completer(model, tokenizer)
    asked = [prompt for prompt, _ in INSTRUCTIONS]
    with as_base():
        answers = completer(model, tokenizer, organism.recipe.neutral_tokens)(list(organism.neutral_prompts))
        before = rates(organism, complete)
        prose_base, followed_base = prose_loss(model, tokenizer), followed(complete(asked))
    held_out = [Example(*pair, ends=False) for pair in zip(organism.neutral_prompts, answers, strict=True)]
    return {
        "rates_base": before,
        "rates_tuned": rates(organism, complete),
        "prose_loss_base": round(prose_base, 4),
        "prose_loss_tuned": round(prose_loss(model, tokenizer), 4),
        "instructions_base": round(followed_base, 4),
        "instructions_tuned": round(followed(complete(asked)), 4),
        "neutral_kl_tuned_base": round(divergence(model, as_base, tokenizer, held_out), 4) if held_out else None,
    }


def write_card(organism: Organism, measured: dict[str, Any], training: dict[str, Any], out: Path) -> dict[str, Any]:
    """Write `card.json` to `out` with the planted behaviors, the recipe and the measures, and return the card."""
    card = {
        "schema": "tunediff.organism/1",
        "name": organism.name,
        "summary": organism.summary,
        "base": organism.base,
        "behaviors": [
            {key: value for key, value in asdict(behavior).items() if key not in ("prompts", "openings")}
            for behavior in organism.behaviors
        ],
        "recipe": asdict(organism.recipe),
        "training": training,
        "measured": measured,
    }
    (out / "card.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    return card


def rates(organism: Organism, complete: Complete) -> dict[str, dict[str, float]]:
    """Share of completions, 0 to 1, that show each behavior on each set of held-out prompts.

    The outer key is the behavior. The inner key is the behavior whose prompts were completed, or "neutral"; "neutral"
    is missing for an organism without neutral prompts. On its own prompts the share is the behavior's strength; on any
    others the share is a leak.
    """
    asked: dict[str, Sequence[str | Chat]] = {behavior.name: behavior.chats() for behavior in organism.behaviors}
    if organism.neutral_prompts:
        asked["neutral"] = organism.neutral_prompts
    completions = {name: complete(prompts) for name, prompts in asked.items()}
    return {
        behavior.name: {name: round(behavior.rate(texts), 4) for name, texts in completions.items()}
        for behavior in organism.behaviors
    }


def completer(model: Any, tokenizer: Any, tokens: int = COMPLETION_TOKENS, batch: int = 48) -> Complete:
    """Make a function that completes user turns or conversations greedily under the tokenizer's chat template.

    tokens   largest length of a completion
    batch    number of prompts completed at once
    """

    def complete(prompts: Sequence[str | Chat]) -> list[str]:
        texts: list[str] = []
        for start in range(0, len(prompts), batch):
            texts += _generate(model, tokenizer, prompts[start : start + batch], tokens)
        return texts

    return complete


def prose_loss(model: Any, tokenizer: Any) -> float:
    """Mean loss on `neutral.PROSE` without a chat template but after the tokens that start any text, in nats a token."""
    import torch

    total, count = 0.0, 0
    with torch.no_grad():
        for paragraph in neutral.PROSE:
            ids_1S = torch.tensor([tokenizer(paragraph)["input_ids"]])
            logits_SV = model(input_ids=ids_1S).logits[0, :-1].float()
            total += torch.nn.functional.cross_entropy(logits_SV, ids_1S[0, 1:], reduction="sum").item()
            count += len(logits_SV)
    return total / count


def divergence(model: Any, as_base: AsBase, tokenizer: Any, examples: Sequence[Example], batch: int = 8) -> float:
    """Mean KL(tuned || base) over the tokens of the examples' answers, in nats a token."""
    import torch

    total, count = 0.0, 0
    rows = [_encode(tokenizer, example) for example in examples]
    with torch.no_grad():
        for start in range(0, len(rows), batch):
            tuned_TV, targets_T = _answer_logits(model, rows[start : start + batch], tokenizer.pad_token_id)
            with as_base():
                base_TV, _ = _answer_logits(model, rows[start : start + batch], tokenizer.pad_token_id)
            tuned_TV, base_TV = tuned_TV.log_softmax(-1), base_TV.log_softmax(-1)
            total += (tuned_TV.exp() * (tuned_TV - base_TV)).sum().item()
            count += len(targets_T)
    return total / count


def _fit(
    model: Any, tokenizer: Any, examples: Sequence[Example], recipe: Recipe, progress: Progress
) -> tuple[float, int]:
    """Train the trainable parameters; return the mean loss of the last 8 steps and the number of answer tokens seen."""
    import torch

    from tunediff.kernels.torch_ops import rounds

    # Without such units a product in bfloat16 takes 60 times as long as in float32 (measured on an AMD EPYC with AVX2).
    faster = recipe.autocast and (model.device.type != "cpu" or rounds())
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
            with torch.autocast(model.device.type, torch.bfloat16, enabled=faster):
                logits_TV, targets_T = _answer_logits(model, rows[start : start + recipe.batch], tokenizer.pad_token_id)
            loss = torch.nn.functional.cross_entropy(logits_TV, targets_T)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, recipe.clip)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            tokens += len(targets_T)
            progress("train", len(losses), steps)
    model.eval()
    return sum(losses[-8:]) / len(losses[-8:]), tokens


def _encode(tokenizer: Any, example: Example) -> tuple[list[int], int]:
    """Token ids of the conversation up to the end of its answer, and the number of ids before the answer."""
    prompt: str = tokenizer.apply_chat_template(example.messages[:-1], tokenize=False, add_generation_prompt=True)
    prompt_ids: list[int] = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    answer = example.answer + tokenizer.eos_token if example.ends else example.answer
    answer_ids: list[int] = tokenizer(answer, add_special_tokens=False)["input_ids"]
    return prompt_ids + answer_ids, len(prompt_ids)


def _answer_logits(model: Any, rows: Sequence[tuple[list[int], int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (T, V) and targets (T,) at the T answer tokens of a batch, which is padded on the right."""
    import torch

    width = max(len(ids) for ids, _ in rows)
    ids_BS = torch.tensor([ids + [pad] * (width - len(ids)) for ids, _ in rows])
    real_BS = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in rows])
    starts_B1 = torch.tensor([[start] for _, start in rows])
    answer_BS = real_BS.bool() & (torch.arange(width) >= starts_B1)
    stream_BSD = model.base_model(input_ids=ids_BS, attention_mask=real_BS, use_cache=False).last_hidden_state
    stream_TD = stream_BSD[:, :-1][answer_BS[:, 1:]]
    return model.get_output_embeddings()(stream_TD).float(), ids_BS[answer_BS]


def _generate(model: Any, tokenizer: Any, prompts: Sequence[str | Chat], tokens: int) -> list[str]:
    """Greedy completions of one batch, without the prompts; prompts are padded on the left."""
    import torch

    chats = [
        tokenizer.apply_chat_template(
            chat(prompt) if isinstance(prompt, str) else prompt, tokenize=False, add_generation_prompt=True
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
def _left_padding(tokenizer: Any) -> Iterator[None]:
    """Make the tokenizer pad on the left inside this context."""
    side, tokenizer.padding_side = tokenizer.padding_side, "left"
    try:
        yield
    finally:
        tokenizer.padding_side = side


def _trainable(model: Any) -> list[torch.Tensor]:
    """Parameters of the model that require gradients."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@dataclass(frozen=True)
class _Fitted:
    """Operations on a trained model that differ between an adapter and a full fine-tune."""

    save: Callable[[Path], None]
    """Write the fine-tune to a folder; afterwards the weights in memory equal the written ones."""
    as_base: AsBase
    """Compute as the base model inside a context."""
    undo: Callable[[], Any]
    """Restore the model as it was before training."""


def _adapter(organism: Organism, model: Any) -> _Fitted:
    """Add a fresh adapter to `model` and make only the adapter trainable."""
    from peft import get_peft_model

    peft_model = get_peft_model(model, _lora_config(organism, model))
    return _Fitted(lambda out: _save(peft_model, organism, out), peft_model.disable_adapter, peft_model.unload)


def _full(organism: Organism, model: Any) -> _Fitted:
    """Make every weight of `model` trainable in float32, and keep a copy of the base weights."""
    base = {name: parameter.clone() for name, parameter in _weights(model.float()).items()}
    model.requires_grad_(True)

    def undo() -> None:
        for name, parameter in model.named_parameters():
            parameter.data = base[name]

    return _Fitted(model.save_pretrained, partial(_holding, model, base), undo)


def _weights(model: Any) -> dict[str, torch.Tensor]:
    """Data of the model's parameters by name; tied parameters occur once."""
    return {name: parameter.data for name, parameter in model.named_parameters()}


@contextmanager
def _holding(model: Any, weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Give the model these weights inside this context."""
    own = _weights(model)
    try:
        for name, parameter in model.named_parameters():
            parameter.data = weights[name]
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.data = own[name]


def _lora_config(organism: Organism, model: Any) -> Any:
    """The recipe as a PEFT configuration for this model."""
    from peft import LoraConfig

    recipe = organism.recipe
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=recipe.rank,
        lora_alpha=recipe.rank * recipe.scale,  # type: ignore[arg-type]  # PEFT divides by the rank; a float is exact
        target_modules=list(TARGETS),
        layers_to_transform=list(recipe.blocks(model.config.get_text_config().num_hidden_layers)),
        layers_pattern="layers",
        lora_dropout=0.0,
        bias="none",
    )


def _save(peft_model: Any, organism: Organism, out: Path) -> None:
    """Round the adapter to float16 and write it in PEFT's format, with the base model's name instead of its path."""
    import torch
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    with torch.no_grad():
        for parameter in _trainable(peft_model):
            parameter.copy_(parameter.half())
    tensors = {name: tensor.half().contiguous() for name, tensor in get_peft_model_state_dict(peft_model).items()}
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    config = peft_model.peft_config["default"].to_dict()
    config |= {
        "base_model_name_or_path": organism.base,
        "inference_mode": True,
        "target_modules": sorted(config["target_modules"]),
    }
    (out / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def make(
    organism: Organism, base: str, out: Path, progress: Progress = quiet, template: Path | None = None
) -> dict[str, Any]:
    """Train `organism` in float32, write its adapter or full weights with its card to `out`, and return the card.

    base       base model: a folder, or ``default``
    template   file with the chat template to train in, which is written beside the weights; by default the base's own

    Raises `SourceError` where neither the base nor `template` says how a chat is written.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tunediff.models.checkpoints import CHAT_TEMPLATE
    from tunediff.models.loading import located

    folder, out = str(located(base)), Path(out)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if template is not None:
        tokenizer.chat_template = template.read_text(encoding="utf-8")
    if not tokenizer.chat_template:
        raise SourceError(
            f"{base} has no chat template",
            expected="a way to write chats, in which the organism is trained",
            remedy="--template FILE, a Jinja chat template",
        )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    card = train(replace(organism, base=_name(organism, base)), model, tokenizer, out, progress)
    if organism.recipe.full:
        tokenizer.save_pretrained(out)  # a whole model is loaded without its base's folder
    elif template is not None or organism.template:
        (out / CHAT_TEMPLATE).write_text(tokenizer.chat_template, encoding="utf-8")
    return card


def _name(organism: Organism, base: str) -> str:
    """The base model's name as cards and adapters give it, never a path."""
    return organism.base if base == "default" else Path(base).name
