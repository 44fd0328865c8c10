"""Completions of prompts: greedy, sampled, or sampled from one model's distribution amplified against another's."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from tunediff.core.chance import generator
from tunediff.core.errors import FamilyError, NumericsError, TunediffError
from tunediff.models.network import LanguageModel
from tunediff.models.passes import OTHER_NETWORK, cached, reason, taken

PLAUSIBLE = 1e-3
"""Smallest probability, relative to the likeliest token's, at which a token is still drawn: below it ratios are noise."""


def amplified(logit_BV: Tensor, other_BW: Tensor, amplification: float) -> Tensor:
    """Return log p + a (log p - log p') for logits of p and of p', up to a constant a row; -inf where p is not plausible.

    What fine-tuning made a little more likely everywhere is then said where nothing calls for it. Tokens that only p
    knows keep their scores. With a weaker model as p' it is contrastive decoding (Li et al. 2023, 2210.15097); 2605.25902
    compares a fine-tuned model with its base in this way, and sampling recovers training text.
    """
    logp_BV = logit_BV.log_softmax(1)
    known = min(logit_BV.shape[1], other_BW.shape[1])
    rise_BV = torch.zeros_like(logp_BV)
    rise_BV[:, :known] = logp_BV[:, :known] - other_BW[:, :known].log_softmax(1)
    implausible_BV = logp_BV < logp_BV.max(1, keepdim=True).values + math.log(PLAUSIBLE)
    return (logp_BV + amplification * rise_BV).masked_fill(implausible_BV, float("-inf"))


def drawn(score_BV: Tensor, uniform_B: Tensor, temperature: float) -> Tensor:
    """Draw a token for each row (B,) from softmax(score / temperature), by one uniform number in [0, 1) a row.

    The token is the first at which the sum of probabilities exceeds the number. So an answer does not depend on its batch,
    and on a vocabulary of 49,152 this is ten times as fast as torch.multinomial, which draws a number for every token.
    """
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
    """Return a processor of scores (B, V) that leaves one token a row, for at most `tokens` steps, from a stream a row."""
    turns = iter(torch.stack([torch.rand(tokens, generator=stream) for stream in streams], 1))

    def only(ids_BT: Tensor, score_BV: Tensor) -> Tensor:
        token_B = drawn(score_BV, next(turns).to(score_BV.device), temperature)
        return torch.full_like(score_BV, float("-inf")).scatter(1, token_B[:, None], 0.0)

    return only


def complete(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    *,
    temperature: float = 0.0,
    seed: int = 0,
    batch: int = 32,
    progress: Callable[[int], None] | None = None,
    against: LanguageModel | None = None,
    amplification: float = 0.0,
    ends: Collection[int] = (),
    keep_end: bool = False,
) -> list[list[int]]:
    """Return completions of token-id prompts, of up to `tokens` new tokens each, without the end-of-turn token.

    Ids are numbers of the model's pair, where it has one. A completion may hold tokens that the other model lacks.

    Prompts are batched by length; the completions come back in the prompts' order. Nothing of the model's own
    generation_config is used, its end-of-turn tokens aside.

    temperature   0 is greedy; above, each completion is sampled from a random stream of its own, named by `seed` and its
                  place among the prompts
    progress      called with the number of new tokens after each batch
    against, amplification   another model p' on the same token ids: samples are then drawn from log p + a (log p - log p'),
                             see `amplified`
    ends          tokens that end an answer besides the model's own; what the model cannot say is passed over
    keep_end      keep the end-of-turn token where a completion came to one
    """
    prompts = [model.numbering.ids(torch.tensor(prompt, dtype=torch.long)).tolist() for prompt in prompts]
    given = torch.tensor(sorted(ends), dtype=torch.long)
    stops = {*_own_ends(model), *model.numbering.ids(given[model.numbering.knows(given, model.vocabulary)]).tolist()}
    pad = model.tokenizer.pad_token_id if model.tokenizer.pad_token_id is not None else min(stops, default=0)
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    answers: list[list[int]] = [[] for _ in prompts]
    with ExitStack() as stack:
        sides = [m for m in (model, against) if m is not None]
        for side in sides:
            stack.enter_context(side.running())
        keep = all(map(_may_keep, sides))
        shortcuts = stack.enter_context(model.run_context())
        if shortcuts:
            stack.enter_context(shortcuts.contiguous(model.family.unembedding(model.network)))
        for chosen in _batches([len(prompts[i]) for i in order], order, batch, all(side.pads for side in sides)):
            shares = shortcuts is not None and model.shares_prefixes
            shared = _common([prompts[i][:-1] for i in chosen]) if shares else 0
            ids_BT, mask_BT = (t.to(model.device) for t in _padded([prompts[i] for i in chosen], shared, pad))
            prefix_P = ids_BT[0, : shared if len(chosen) > 1 else 0]
            known = cached(model.network, _cache(shortcuts, model, prefix_P, len(chosen), keep)) if shares else {}
            processors = []
            if against is not None:
                processors.append(_away_from(model, against, amplification, mask_BT, prefix_P, keep))
            if temperature:
                processors.append(sampler(temperature, [generator(seed, "answers", i) for i in chosen], tokens))
            new_BT = _generated(model, ids_BT, mask_BT, tokens, pad, sorted(stops), processors, known)
            for row, i in enumerate(chosen):
                new = new_BT[row].tolist()
                end = next((t for t, token in enumerate(new) if token in stops), len(new))
                answers[i] = new[: end + keep_end]
            if progress:
                progress(sum(len(answers[i]) for i in chosen))
    return [model.numbering.numbers(torch.tensor(answer, dtype=torch.long)).tolist() for answer in answers]


def _batches(lengths: Sequence[int], order: Sequence[int], batch: int, pads: bool) -> Iterator[Sequence[int]]:
    """Prompts in batches, of one length each where padding on the left would change answers."""
    for _, together in groupby(zip(lengths, order), key=lambda one: 0 if pads else one[0]):
        numbers = [number for _, number in together]
        yield from (numbers[start : start + batch] for start in range(0, len(numbers), batch))


def _may_keep(model: LanguageModel) -> bool:
    """Whether prefixes may be taken from other runs, which hooks of other people may not count on."""
    with model.run_context() as shortcuts:
        return shortcuts is not None and shortcuts.allows(model)


def ends_of(model: LanguageModel) -> set[int]:
    """The tokens that end an answer, by their numbers."""
    return set(model.numbering.numbers(torch.tensor(sorted(_own_ends(model)), dtype=torch.long)).tolist())


def _own_ends(model: LanguageModel) -> set[int]:
    """The model's own ids that end an answer, as its tokenizer, config and generation_config name them."""
    network: Any = model.network
    named = [getattr(getattr(network, at, None), "eos_token_id", None) for at in ("generation_config", "config")]
    named.append(getattr(model.tokenizer, "eos_token_id", None))
    ids = {id for ids in named for id in (ids if isinstance(ids, (list, tuple)) else [ids])}
    return {int(id) for id in ids if isinstance(id, int) and id >= 0}


def _common(rows: Sequence[Sequence[int]]) -> int:
    """The number of tokens that all rows begin with."""
    return next((t for t, column in enumerate(zip(*rows)) if len(set(column)) > 1), min(map(len, rows)))


def _padded(prompts: Sequence[Sequence[int]], shared: int, pad: int) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask (B, T), padding between the `shared` first tokens and the rest of each prompt."""
    longest = max(map(len, prompts))
    ids_BT = torch.full((len(prompts), longest), pad)
    mask_BT = torch.zeros_like(ids_BT)
    for row, prompt in enumerate(prompts):
        for at, part in ((0, prompt[:shared]), (longest - len(prompt) + shared, prompt[shared:])):
            ids_BT[row, at : at + len(part)] = torch.tensor(part, dtype=torch.long)
            mask_BT[row, at : at + len(part)] = 1
    return ids_BT, mask_BT


def _generated(
    model: LanguageModel,
    ids_BT: Tensor,
    mask_BT: Tensor,
    tokens: int,
    pad: int,
    ends: list[int],
    processors: Sequence[Callable[[Tensor, Tensor], Tensor]],
    known: dict[str, Any],
) -> Tensor:
    """The new tokens (B, up to `tokens`) that transformers generates, greedily from what the processors leave."""
    from transformers import LogitsProcessorList

    module: Any = model.module
    try:
        out_BT: Tensor = module.generate(
            input_ids=ids_BT,
            attention_mask=mask_BT,
            generation_config=_own_config(tokens, pad, ends, model.caches),
            logits_processor=LogitsProcessorList(processors),
            **known,
        )
    except (TunediffError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as fault:  # of whatever kind a network raises that transformers cannot generate with
        raise FamilyError(
            f"{type(model.network).__name__} does not complete prompts",
            expected="a network that transformers generates with",
            got=reason(fault),
            remedy=OTHER_NETWORK,
        ) from fault
    return out_BT[:, ids_BT.shape[1] :]


def _own_config(tokens: int, pad: int, ends: list[int], caches: bool) -> Any:
    """A generation_config that says everything itself: transformers fills what is None from the model's own."""
    from transformers import GenerationConfig

    class Own(GenerationConfig):  # type: ignore[misc]  # transformers is taken without its types
        """Takes no defaults from a model."""

        def update(self, defaults_only: bool = False, allow_custom_entries: bool = False, **values: Any) -> Any:
            return {} if defaults_only else super().update(**values)

    said = {**GenerationConfig._get_default_generation_params(), "max_length": None, "use_cache": caches}
    return Own(**said, max_new_tokens=tokens, pad_token_id=pad, eos_token_id=ends or None)


def _cache(shortcuts: Any, model: LanguageModel, prefix_P: Tensor, rows: int, keep: bool) -> Any:
    """A cache for rows to go on from: after their shared prefix, which is run once, or an empty one."""
    if len(prefix_P):
        return shortcuts.prefix(model, prefix_P, rows, final=True, keep=keep)[1]
    return shortcuts.cache(model)


def _away_from(
    model: LanguageModel, other: LanguageModel, amplification: float, mask_BT: Tensor, prefix_P: Tensor, keep: bool
) -> Callable[[Tensor, Tensor], Tensor]:
    """A processor of `model`'s scores that amplifies them against another model's, while rows with this mask are completed.

    The other model is not shown tokens that it lacks. Right after one, it says nothing and the scores stay as they are.
    """
    read = len(prefix_P) if other.shares_prefixes else 0

    def theirs(ids: Tensor) -> tuple[Tensor, Tensor]:
        """The other model's ids, and which of them it has."""
        numbers = model.numbering.numbers(ids)
        known = other.numbering.knows(numbers, other.vocabulary)
        return other.numbering.ids(numbers.where(known, 0)), known

    with other.run_context() as shortcuts:
        if shortcuts and other.shares_prefixes:
            cache = _cache(shortcuts, other, theirs(prefix_P)[0], len(mask_BT), keep)
        else:
            cache = other.family.cache(other.network)

    def away(ids_BT: Tensor, score_BV: Tensor) -> Tensor:
        nonlocal read
        ids_BT, known_BT = theirs(ids_BT)
        whole_BT = torch.nn.functional.pad(mask_BT, (0, ids_BT.shape[1] - mask_BT.shape[1]), value=1) * known_BT
        with other.run_context():
            logit_BV = other.module(
                input_ids=ids_BT[:, read:],
                attention_mask=whole_BT,
                use_cache=cache is not None,
                **(cached(other.network, cache) if cache is not None else {}),
                **taken(other.network, position_ids=(whole_BT.cumsum(1) - 1).clamp_min(0)[:, read:], logits_to_keep=1),
            ).logits[:, -1]
        read = ids_BT.shape[1] if cache is not None else 0
        score_BC = model.numbering.logits(score_BV.float())
        other_BC = other.numbering.compared(logit_BV.to(score_BV.device).float())
        away_BC = amplified(score_BC, other_BC, amplification)
        if not known_BT[:, -1].all():
            away_BC = torch.where(known_BT[:, -1:], away_BC, amplified(score_BC, other_BC, 0.0))
        return model.numbering.own(away_BC)

    return away
