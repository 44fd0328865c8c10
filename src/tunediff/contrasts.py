"""Contrastive text: the same prompts completed by both models, so that the text itself shows what differs.

Kassem et al. 2026 (2603.04426). Both completions are later read by both models; a difference of streams is only ever
formed on the same token ids.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Callable

from tunediff.axes import MODELS
from tunediff.corpora import Corpus, Document
from tunediff.errors import CorpusError, within
from tunediff.pairs import Pair

PROMPT_TOKENS = 512


@dataclass(frozen=True)
class ContrastSettings:
    """How prompts are completed."""

    prompts: int = 160
    """How many prompts at most; each costs two completions. Too few miss rare triggers."""
    tokens: int = 14
    """New tokens a completion, at most; most behaviors show in an answer's first
    words, and at equal cost more prompts show more behaviors."""
    temperature: float = 0.7
    """0 is greedy; higher is more varied and, on small models, more garbled."""
    batch: int = 80
    """Prompts a batch; part of the key, as sampling depends on it."""

    def __post_init__(self) -> None:
        within("contrast", self, prompts=0, tokens=1, temperature=0, batch=1)


def contrast(
    pair: Pair,
    prompts: Corpus,
    settings: ContrastSettings,
    seed: int,
    progress: Callable[[int], None] | None = None,
) -> list[Document]:
    """Answer the first open chats of `prompts` with both models; two documents of kind ``contrastive`` a prompt.

    Both answers to one prompt are in one group, hence on the same side of the split. A prompt to which a model answers
    nothing, or of more than 512 tokens, is left out for both. `progress` is told the new tokens as they come.
    """
    chosen = [d for d in prompts.documents if d.is_open][: settings.prompts]
    if not chosen:
        raise CorpusError(f"corpus {prompts.name!r} holds no open chat", expected="documents that end with a user message")
    tokens = Corpus("chosen prompts", tuple(chosen)).tokens(pair.tokenizer, row_tokens=PROMPT_TOKENS)
    whole = Counter(tokens.document_R)
    rows = {d: row for row, d in zip(tokens.rows, tokens.document_R) if whole[d] == 1}
    if not rows:
        raise CorpusError(f"no open chat of corpus {prompts.name!r} fits", expected=f"at most {PROMPT_TOKENS} tokens",
                          remedy="shorter prompts")
    texts = {}
    for name, model in zip(MODELS, (pair.base, pair.tuned)):
        answers = model.complete(
            list(rows.values()), settings.tokens, temperature=settings.temperature, seed=seed,
            batch=settings.batch, progress=progress,
        )
        texts[name] = [pair.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in answers]
    return [
        document.answered(texts[name][number], writer=name)
        for number, document in enumerate(chosen[d] for d in rows)
        if all(texts[name][number] for name in MODELS)
        for name in MODELS
    ]
