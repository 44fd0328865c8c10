"""Contrastive text: both models complete the same prompts, so that the text itself shows how the models differ.

Source: Kassem et al. 2026 (2603.04426). Both models later read both completions, because a difference of streams needs
the same token ids. These are the very ids that were asked and answered; nothing is rendered or encoded again.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from tunediff.core.axes import WRITERS
from tunediff.core.errors import CorpusError, within
from tunediff.core.remarks import Remark, Remarks
from tunediff.models.completing import complete, ends_of
from tunediff.models.divergences import Said, kl_divergence
from tunediff.models.network import LanguageModel
from tunediff.models.pair import Pair
from tunediff.texts.chat_template import ChatTemplate
from tunediff.texts.corpus import Corpus
from tunediff.texts.document import Document
from tunediff.texts.tokens import Tokens

PROMPT_TOKENS = 512
BATCH_TOKENS = 2048


@dataclass(frozen=True)
class ContrastSettings:
    """How prompts are chosen and completed."""

    prompts: int = 128
    """Largest number of prompts that are answered. Each costs two completions; too few miss rare triggers."""
    pool: int = 480
    """Largest number of prompts to choose from. Each costs one forward pass of both models."""
    screened: float = 0.5
    """Share of the answered prompts (0..1) that are chosen because the models' first word differs the most on them.
    The others are the pool's first. Behaviors with a rare trigger then show often enough to be tested on held-out text;
    rates are rates on this text. 0 takes the first only."""
    tokens: int = 14
    """Largest number of new tokens in a completion. Most behaviors show in an answer's first words, and at equal cost
    more prompts show more behaviors."""
    temperature: float = 0.7
    """Sampling temperature. 0 is greedy; higher is more varied and, on small models, more garbled."""
    amplified: float = 0.5
    """Share of the answered prompts (0..1), first ones first, that the tuned model answers once more with its
    difference from base amplified. A narrow behavior then shows where no prompt calls for it. Each costs two
    completions."""
    amplification: float = 3.0
    """Strength a of the amplification: log p(tuned) + a (log p(tuned) - log p(base)) is sampled. Too much gives
    noise."""
    batch: int = 80
    """Prompts in a batch. Part of the content key, because sums of floats may depend on it in the last bit."""

    def __post_init__(self) -> None:
        within(
            "contrast",
            self,
            prompts=0,
            pool=0,
            screened=(0, 1),
            tokens=1,
            temperature=0,
            amplified=(0, 1),
            amplification=0,
            batch=1,
        )

    def amplified_of(self, prompts: int) -> int:
        """Number of prompts, out of `prompts` answered ones, that are answered amplified too."""
        return round(self.amplified * prompts) if self.amplification else 0


@dataclass(frozen=True)
class Contrast:
    """Contrastive text, with what was adapted, left out or empty on the way to it."""

    documents: list[Document]
    remarks: list[Remark] = field(default_factory=list)

    def __str__(self) -> str:
        return "; ".join([f"{len(self.documents)} completions", *map(str, self.remarks)])


def contrast(
    pair: Pair,
    prompts: Corpus,
    settings: ContrastSettings,
    seed: int,
    template: ChatTemplate | None = None,
    progress: Callable[[int], None] | None = None,
) -> Contrast:
    """Answer the open chats of `prompts` with both models, and return the answers as documents of kind ``contrastive``.

    Each prompt gives two documents, or three if tuned also answers with amplification. All answers to one prompt are in
    one group, so they are on the same side of the split. A document carries the tokens that the model was asked after and
    those that it answered, the end-of-turn token included; an answer that is this token alone counts. Prompts of more
    than 512 tokens, or than the models have positions for, are left out, and prompts that the models' tokenizers cut
    differently. Tokens that only one model has are left out of answers, of which nothing may then be left. `template` is
    the form in which both are asked, the pair's own without it. `progress` is called with the number of new tokens.
    """
    template = template or ChatTemplate.chosen("auto", pair.base.tokenizer, pair.tuned.tokenizer)
    pool = [d for d in prompts.documents if d.is_open][: max(settings.pool, settings.prompts)]
    if not pool:
        raise CorpusError(
            f"corpus {prompts.name!r} holds no open chat", expected="documents that end with a user message"
        )
    room = pair.fitting("prompts with their answers", PROMPT_TOKENS + settings.tokens) - settings.tokens
    if room < 1:
        raise CorpusError(
            "answers are longer than the models have positions",
            expected=f"at most {room + settings.tokens} tokens for prompt and answer",
            got=f"contrast.tokens = {settings.tokens}",
            remedy="--set contrast.tokens=14",
        )
    tokens = replace(prompts, documents=tuple(pool)).tokens(pair.tokenizer, row_tokens=room, template=template)
    remarks = Remarks()
    for remark in tokens.remarks:
        remarks.add(f"prompts: {remark.what}", remark.first, remark.count)
    whole = Counter(tokens.document_R)
    for d in (d for d, count in whole.items() if count > 1):
        remarks.add(f"prompts left out that are longer than {room} tokens", pool[d].id)
    tokens = tokens.only([row for row, d in enumerate(tokens.document_R) if whole[d] == 1])
    if not tokens.rows:
        raise CorpusError(
            f"no open chat of corpus {prompts.name!r} fits",
            expected=f"at most {room} tokens",
            remedy="give shorter prompts, or --set corpus.prompts=[] for those that ship",
        )
    tokens, notes = pair.vocabularies.read_by_both(tokens, pair.tokenizer, 0.0)
    for note in notes:
        remarks.add(f"prompts: {note}")
    tokens = tokens.only(screen(pair, tokens, settings))
    rows = {d: row for row, d in zip(tokens.rows, tokens.document_R)}
    first = list(rows)[: settings.amplified_of(len(rows))]
    ends = ends_of_turn(pair, template)
    answers: dict[str, dict[int, list[int]]] = {name: {} for name in WRITERS}
    for name, model, asked, away in (
        ("base", pair.base, list(rows), {}),
        ("tuned", pair.tuned, list(rows), {}),
        ("amplified", pair.tuned, first, {"against": pair.base, "amplification": settings.amplification}),
    ):
        if not asked:
            continue
        made = complete(
            model,
            [rows[d] for d in asked],
            settings.tokens,
            temperature=settings.temperature,
            seed=seed,
            batch=settings.batch,
            progress=progress,
            ends=ends,
            keep_end=True,
            **away,
        )
        answers[name] = {d: _until(template.end, ids, model) for d, ids in zip(asked, made)}
    documents = []
    for d, name in itertools.product(rows, WRITERS):
        if d not in answers[name]:
            continue
        ids = answers[name][d]
        shared = tuple(filter(pair.vocabularies.readable, ids))
        side = pair.base if name == "base" else pair.tuned
        text = _text([id for id in ids if id not in ends], side, skip_special_tokens=True).strip()
        if len(shared) < len(ids):
            remarks.add(f"answers by {name} without tokens that only one model knows", pool[d].id)
        if not text:
            remarks.add(f"answers by {name} that are empty", pool[d].id)
        documents.append(pool[d].answered(text, name, prompt_ids=rows[d], answer_ids=shared))
    return Contrast(documents, list(remarks.all()))


def ends_of_turn(pair: Pair, template: ChatTemplate) -> set[int]:
    """Tokens that end an answer of either model: those that both name, and the one that the template writes."""
    return ends_of(pair.base) | ends_of(pair.tuned) | template.end_of_turn(pair.tokenizer)


def _until(end: str, ids: list[int], model: LanguageModel) -> list[int]:
    """An answer up to the line break at which, in plain lines, the next turn begins."""
    if not end or end not in (text := _text(ids, model)):
        return ids
    length = text.index(end) + 1
    return ids[: next(n for n in range(len(ids), -1, -1) if len(_text(ids[:n], model)) <= length)]


def _text(ids: list[int], model: LanguageModel, **how: Any) -> str:
    """Tokens of the pair as text, as the tokenizer of a model writes them."""
    return str(model.tokenizer.decode(model.numbering.ids(torch.tensor(ids, dtype=torch.long)), **how))


def screen(pair: Pair, tokens: Tokens, settings: ContrastSettings) -> list[int]:
    """Return the row numbers, ascending, of the prompts to answer.

    They are the first prompts, and those of the others with the largest KL(tuned || base) of the answer's first token.
    The latter come from both sides of the split in proportion.
    """
    count = min(settings.prompts, len(tokens.rows))
    first = count if count == len(tokens.rows) else count - round(settings.screened * count)
    chosen, rest = list(range(first)), list(range(first, len(tokens.rows)))
    if first == count:
        return chosen
    kl = dict(zip(rest, first_word_divergence(pair, tokens.only(rest)).tolist()))
    sides = {held: [r for r in rest if tokens.held_out[tokens.document_R[r]] == held] for held in (False, True)}
    wanted = round((count - first) * len(sides[True]) / len(rest))
    for held, some in ((True, wanted), (False, count - first - wanted)):
        chosen += sorted(sides[held], key=lambda r: (-kl[r], r))[:some]
    return sorted(chosen)


def first_word_divergence(pair: Pair, tokens: Tokens) -> Tensor:
    """Return KL(tuned || base) in nat of the predicted token after each row, (R,)."""
    kl_R = torch.zeros(len(tokens.rows))
    for batch in tokens.batches(BATCH_TOKENS):
        last_BT = torch.zeros_like(batch.mask_BT)
        last_BT[torch.arange(len(last_BT)), batch.mask_BT.sum(1) - 1] = True
        base_BTD, tuned_BTD, _ = pair.both_states(batch.ids_BT, wanted_BT=last_BT)
        base, tuned = (
            Said(m, states[last_BT], pair.vocabulary) for m, states in ((pair.base, base_BTD), (pair.tuned, tuned_BTD))
        )
        kl_R[batch.rows_B] = kl_divergence(tuned, base).cpu()
    return kl_R
