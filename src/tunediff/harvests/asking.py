"""Asking: open chats as the token ids that both models are asked after, and their answers as documents.

Both models later read both answers, because a difference of streams needs the same token ids. These are the very ids that
were asked and answered; nothing is rendered or encoded again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tunediff.core.errors import CorpusError
from tunediff.core.remarks import Remarks
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


@dataclass(frozen=True, eq=False)
class Asking:
    """How both models of a pair are asked.

    template   form in which chats are asked
    tokens     largest number of new tokens in an answer
    batch      prompts in a batch; sums of floats may depend on it in the last bit
    setting    the setting that `tokens` comes from, for errors
    remarks    what was adapted, left out or empty
    """

    pair: Pair
    template: ChatTemplate
    tokens: int
    batch: int
    seed: int = 0
    setting: str = "contrast.tokens"
    remarks: Remarks = field(default_factory=Remarks)

    @cached_property
    def ends(self) -> set[int]:
        """Tokens that end an answer."""
        return ends_of_turn(self.pair, self.template)

    @cached_property
    def room(self) -> int:
        """Largest number of tokens in a prompt; raises `CorpusError` where answers leave none."""
        room = self.pair.fitting("prompts with their answers", PROMPT_TOKENS + self.tokens) - self.tokens
        if room < 1:
            raise CorpusError(
                "answers are longer than the models have positions",
                expected=f"at most {room + self.tokens} tokens for prompt and answer",
                got=f"{self.setting} = {self.tokens}",
                remedy=f"--set {self.setting}=14",
            )
        return room

    def encoded(self, prompts: Corpus) -> Tokens:
        """The open chats of `prompts` as rows of ids, a row each, up to the opening of the assistant's turn.

        Prompts are left out that are longer than the models have room for, and those that the models' tokenizers cut
        differently. Raises `CorpusError` if none fits.
        """
        room, remarks, documents = self.room, self.remarks, prompts.documents
        tokens = prompts.tokens(self.pair.tokenizer, row_tokens=room, template=self.template)
        for remark in tokens.remarks:
            remarks.add(f"prompts: {remark.what}", remark.first, remark.count)
        whole = Counter(tokens.document_R)
        for d in (d for d, count in whole.items() if count > 1):
            remarks.add(f"prompts left out that are longer than {room} tokens", documents[d].id)
        tokens = tokens.only([row for row, d in enumerate(tokens.document_R) if whole[d] == 1])
        if not tokens.rows:
            raise CorpusError(
                f"no open chat of corpus {prompts.name!r} fits",
                expected=f"at most {room} tokens",
                remedy="give shorter prompts, or --set corpus.prompts=[] for those that ship",
            )
        tokens, notes = self.pair.vocabularies.read_by_both(tokens, self.pair.tokenizer, 0.0)
        for note in notes:
            remarks.add(f"prompts: {note}")
        return tokens

    def answers(
        self,
        model: LanguageModel,
        asked: Sequence[Sequence[int]],
        temperature: float = 0.0,
        progress: Callable[[int], None] | None = None,
        away: Mapping[str, Any] | None = None,
    ) -> list[list[int]]:
        """A model's answers, each as ids with the end-of-turn token where it came to one.

        away   `against` and `amplification` of `complete`, for answers away from another model's
        """
        made = complete(
            model,
            asked,
            self.tokens,
            temperature=temperature,
            seed=self.seed,
            batch=self.batch,
            progress=progress,
            ends=self.ends,
            keep_end=True,
            **(away or {}),
        )
        return [_until(self.template.end, ids, model) for ids in made]

    def document(self, asked: Document, writer: str, prompt_ids: Sequence[int], answer: Sequence[int]) -> Document:
        """An open chat with its answer, as a document that carries the ids of both.

        Tokens that only one model has are left out, of which nothing may then be left.
        """
        shared = tuple(filter(self.pair.vocabularies.readable, answer))
        side = self.pair.base if writer == "base" else self.pair.tuned
        text = said(side, [id for id in answer if id not in self.ends], skip_special_tokens=True).strip()
        if len(shared) < len(answer):
            self.remarks.add(f"answers by {writer} without tokens that only one model knows", asked.id)
        if not text:
            self.remarks.add(f"answers by {writer} that are empty", asked.id)
        return asked.answered(text, writer, prompt_ids=tuple(prompt_ids), answer_ids=shared)


def among(corpus: Corpus, documents: Sequence[Document]) -> Corpus:
    """The corpus with other documents: its name, and its split."""
    return replace(corpus, documents=tuple(documents))


def ends_of_turn(pair: Pair, template: ChatTemplate) -> set[int]:
    """Tokens that end an answer of either model: those that both name, and the one that the template writes."""
    return ends_of(pair.base) | ends_of(pair.tuned) | template.end_of_turn(pair.tokenizer)


def said(model: LanguageModel, ids: Sequence[int], **how: Any) -> str:
    """Tokens of the pair as text, as the tokenizer of a model writes them."""
    return str(model.tokenizer.decode(model.numbering.ids(torch.tensor(ids, dtype=torch.long)), **how))


def _until(end: str, ids: list[int], model: LanguageModel) -> list[int]:
    """An answer up to the line break at which, in plain lines, the next turn begins."""
    if not end or end not in (text := said(model, ids)):
        return ids
    length = text.index(end) + 1
    return ids[: next(n for n in range(len(ids), -1, -1) if len(said(model, ids[:n])) <= length)]


def answer_divergence(pair: Pair, tokens: Tokens) -> Tensor:
    """The mean KL(tuned || base), nat a token, of the predictions of each row's answer (R,); 0 where it has no token."""
    last_R = [len(row) - 2 for row in tokens.rows]
    return _divergence(pair, tokens, [before - 1 for before in tokens.prompt_R], last_R)


def next_divergence(pair: Pair, tokens: Tokens) -> Tensor:
    """KL(tuned || base) in nat of the token predicted after each row, (R,)."""
    last_R = [len(row) - 1 for row in tokens.rows]
    return _divergence(pair, tokens, last_R, last_R)


def _divergence(pair: Pair, tokens: Tokens, first_R: Sequence[int], last_R: Sequence[int]) -> Tensor:
    """The mean KL(tuned || base) of the predictions after the positions from `first_R` to `last_R` of each row."""
    kl_R = torch.zeros(len(tokens.rows))
    for batch in tokens.batches(BATCH_TOKENS):
        first_B, last_B = (torch.tensor([some[row] for row in batch.rows_B.tolist()]) for some in (first_R, last_R))
        at_T = torch.arange(batch.ids_BT.shape[1])
        wanted_BT = (at_T >= first_B[:, None]) & (at_T <= last_B[:, None])
        if not wanted_BT.any():
            continue
        base_BTD, tuned_BTD, _ = pair.both_states(batch.ids_BT, wanted_BT=wanted_BT)
        base, tuned = (
            Said(m, states[wanted_BT], pair.vocabulary)
            for m, states in ((pair.base, base_BTD), (pair.tuned, tuned_BTD))
        )
        kl_BT = torch.zeros(wanted_BT.shape)
        kl_BT[wanted_BT] = kl_divergence(tuned, base).cpu()
        kl_R[batch.rows_B] = kl_BT.sum(1) / wanted_BT.sum(1).clamp_min(1)
    return kl_R
