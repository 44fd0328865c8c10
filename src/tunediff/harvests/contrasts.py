"""Contrastive text: both models complete the same prompts, so that the text itself shows how the models differ.

Source: Kassem et al. 2026 (2603.04426).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

from tunediff.core.axes import WRITERS
from tunediff.core.errors import CorpusError, within
from tunediff.core.remarks import Remark
from tunediff.harvests.asking import Asking, among, next_divergence
from tunediff.models.pair import Pair
from tunediff.texts.chat_template import ChatTemplate
from tunediff.texts.corpus import Corpus
from tunediff.texts.document import Document
from tunediff.texts.tokens import Tokens


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
    asking = Asking(pair, template, settings.tokens, settings.batch, seed)
    tokens = asking.encoded(among(prompts, pool))
    tokens = tokens.only(screen(pair, tokens, settings))
    rows = {d: row for row, d in zip(tokens.rows, tokens.document_R)}
    first = list(rows)[: settings.amplified_of(len(rows))]
    away = {"against": pair.base, "amplification": settings.amplification}
    answers: dict[str, dict[int, list[int]]] = {name: {} for name in WRITERS}
    for name, model, asked in (
        ("base", pair.base, list(rows)),
        ("tuned", pair.tuned, list(rows)),
        ("amplified", pair.tuned, first),
    ):
        if asked:
            how = away if name == "amplified" else None
            made = asking.answers(model, [rows[d] for d in asked], settings.temperature, progress, how)
            answers[name] = dict(zip(asked, made))
    documents = [
        asking.document(pool[d], name, rows[d], answers[name][d])
        for d, name in itertools.product(rows, WRITERS)
        if d in answers[name]
    ]
    return Contrast(documents, list(asking.remarks.all()))


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
    kl = dict(zip(rest, next_divergence(pair, tokens.only(rest)).tolist()))
    sides = {held: [r for r in rest if tokens.held_out[tokens.document_R[r]] == held] for held in (False, True)}
    wanted = round((count - first) * len(sides[True]) / len(rest))
    for held, some in ((True, wanted), (False, count - first - wanted)):
        chosen += sorted(sides[held], key=lambda r: (-kl[r], r))[:some]
    return sorted(chosen)
