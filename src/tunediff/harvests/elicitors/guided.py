"""Guided search: short strings after a prompt that drive the models apart, found token by token along the gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tunediff.core.chance import generator
from tunediff.core.errors import CorpusError, within
from tunediff.harvests.asking import among, next_divergence, said
from tunediff.harvests.elicitors.base import Elicitor, Scope
from tunediff.harvests.questions import GAP, Question
from tunediff.models.network import LanguageModel
from tunediff.models.pair import Pair
from tunediff.texts.tokens import Tokens


@dataclass(frozen=True)
class Guided(Elicitor):
    """Searches for strings at the end of everyday prompts that raise KL(tuned || base) of the answer's first token.

    A string begins as a word that tuned raises, or as random tokens. In each round, tokens are swapped for those that the
    gradient of the divergence at their embeddings favors, and the best swap stays (greedy coordinate gradient of Zou et
    al. 2023, 2307.15043, there for one model and a target text). A backdoor's trigger is often near to what half triggers
    it, so that the search has a slope to climb. Only printable tokens are tried, because a finding must be typed.
    """

    length: int = 3
    """Number of tokens in a string."""
    starts: int = 2
    """Number of strings that are searched for."""
    rounds: int = 5
    """Number of swaps of each string."""
    swaps: int = 16
    """Number of swaps tried in a round. Each costs one forward pass of both models on each prompt."""
    prompts: int = 2
    """Number of prompts that a string stands behind; one alone would be answered oddly by chance."""

    def __post_init__(self) -> None:
        within("elicit.guided", self, length=1, starts=0, rounds=0, swaps=1, prompts=1)

    def search(self, scope: Scope) -> None:
        """Search from every start, then ask with the strings that were found: the same prompts, and others for a test."""
        asking, pair = scope.asker.asking, scope.pair
        firsts = [chat.messages[0][1] for chat in scope.chats if len(chat.messages) == 2]
        firsts = [text for text in dict.fromkeys(firsts) if GAP not in text]
        prompts, others = firsts[: self.prompts], firsts[self.prompts : self.prompts + OTHERS]
        if not prompts or not scope.left:
            return
        forms = [f"{prompt} {GAP}" for prompt in prompts]
        questions, plain = ([Question(f, MARK).document for f in some] for some in (forms, prompts))
        try:
            tokens, bare = (asking.encoded(among(scope.asker.split, some)) for some in (questions, plain))
        except CorpusError:
            return  # no prompt fits
        if len(tokens.rows) != len(forms):
            return
        tail = _common_end([*tokens.rows, *bare.rows])
        mark = len(pair.tokenizer(f" {MARK}", add_special_tokens=False)["input_ids"])
        places = [len(row) - tail - mark for row in tokens.rows]
        tried: dict[str, float] = {}
        allowed_V = _printable(pair)
        rng = generator(scope.seed, "guided")
        for start in range(self.starts):
            string = self._start(scope, start, allowed_V, rng)
            best = -1.0
            for _ in range(self.rounds):
                options = [string, *self._swaps(pair, tokens, places, mark, string, allowed_V, rng)]
                rows = [_put(tokens, places, mark, option) for option in options]
                kl = self._apart(pair, tokens, rows)
                top = int(torch.tensor(kl).argmax())
                tried.update({said(pair.tuned, o).strip(): value for o, value in zip(options, kl)})
                if kl[top] <= best:
                    break
                string, best = options[top], kl[top]
        strings = [text for text, _ in sorted(tried.items(), key=lambda one: -one[1]) if text]
        same = [Question(form, text) for text in strings for form in forms]
        scope.asker.spoiled |= {question.document.id for question in same}
        behind = (Question(f"{prompt} {GAP}", text) for text in strings[:STRINGS] for prompt in others)
        scope.ask([*same[: scope.left // 2], *behind])

    def _start(self, scope: Scope, start: int, allowed_V: Tensor, rng: torch.Generator) -> list[int]:
        """The ids that a string begins as: a raised word where there is one left, filled up with random tokens."""
        tokenizer = scope.pair.tokenizer
        word = (
            tokenizer(f" {scope.words[start]}", add_special_tokens=False)["input_ids"]
            if start < len(scope.words)
            else []
        )
        ids = allowed_V.nonzero()[:, 0]
        rest = ids[torch.randint(len(ids), (self.length,), generator=rng)].tolist()
        return [*word, *rest][: self.length]

    def _swaps(
        self,
        pair: Pair,
        tokens: Tokens,
        places: Sequence[int],
        mark: int,
        string: list[int],
        allowed_V: Tensor,
        rng: torch.Generator,
    ) -> list[list[int]]:
        """Strings with one token swapped, drawn from the swaps that the gradient favors at each place."""
        gain_LV = torch.zeros(len(string), len(allowed_V))
        for row, place in zip(_put(tokens, places, mark, string), places):
            gain_LV += _favor(pair, row, slice(place, place + len(string)), len(allowed_V))
        gain_LV[:, ~allowed_V] = -torch.inf
        first_LK = gain_LV.topk(min(4 * self.swaps, int(allowed_V.sum()))).indices
        made = []
        for number in range(self.swaps):
            place = number % len(string)
            token = int(first_LK[place, torch.randint(first_LK.shape[1], (1,), generator=rng)])
            made.append([*string[:place], token, *string[place + 1 :]])
        return made

    def _apart(self, pair: Pair, tokens: Tokens, rows: Sequence[Sequence[tuple[int, ...]]]) -> list[float]:
        """The divergence of the answer's first token for each string's rows: the square of its mean root over prompts.

        So a string has to work after every prompt; one that makes a single odd answer does not lead.
        """
        flat = [row for some in rows for row in some]
        many = replace(tokens.only([0] * len(flat)), rows=tuple(flat))
        return next_divergence(pair, many).reshape(len(rows), -1).sqrt().mean(1).square().tolist()


OTHERS = 16
"""Number of prompts beyond those of the search that the best strings are asked behind."""
STRINGS = 3
"""Number of these strings."""
MARK = "zq"
"""In place of a string, to find where it goes."""


def _common_end(rows: Sequence[Sequence[int]]) -> int:
    """The number of tokens that all rows end with."""
    columns = zip(*(reversed(row) for row in rows))
    return next((t for t, column in enumerate(columns) if len(set(column)) > 1), min(map(len, rows)))


def _put(tokens: Tokens, places: Sequence[int], mark: int, string: Sequence[int]) -> list[tuple[int, ...]]:
    """Each prompt's row with a string in its place."""
    return [(*row[:place], *string, *row[place + mark :]) for row, place in zip(tokens.rows, places)]


def _printable(pair: Pair) -> Tensor:
    """Which tokens (V,) may stand in a string: those that both models read and a person can type."""
    special = set(getattr(pair.tokenizer, "all_special_ids", ())) | set(
        getattr(pair.tokenizer, "added_tokens_decoder", ())
    )
    allowed = torch.zeros(pair.vocabulary, dtype=torch.bool)
    for id, text in enumerate(pair.tokenizer.batch_decode([[n] for n in range(len(pair.tokenizer))])):
        fits = id < len(allowed) and id not in special and text.strip() and text.isascii() and text.isprintable()
        if fits and pair.vocabularies.readable(id):
            allowed[id] = True
    return allowed


def _favor(pair: Pair, row: Sequence[int], span: slice, vocabulary: int) -> Tensor:
    """By how much, to first order, KL(tuned || base) of the next token rises if a token of the span is swapped, (L, V)."""
    ids_1T = torch.tensor([row])
    streams, logps = [], []
    for model in (pair.tuned, pair.base):
        embedded, logit_V = _differentiable(model, ids_1T)
        streams.append(embedded)
        logps.append(model.numbering.compared(logit_V).float()[: pair.vocabulary].log_softmax(-1))
    kl = (logps[0].exp() * (logps[0] - logps[1])).sum()
    gain_LV = torch.zeros(span.stop - span.start, vocabulary)
    for model, gradient_1TD in zip((pair.tuned, pair.base), torch.autograd.grad(kl, streams)):
        numbers = torch.arange(vocabulary)
        with torch.no_grad(), model.switch():
            known_V = model.numbering.knows(numbers, model.vocabulary)
            rows_VD = _table(model)(model.numbering.ids(numbers.where(known_V, 0)).to(model.device))
            gradient_LD = gradient_1TD[0, span].float()
            now_L = (gradient_LD * rows_VD[torch.tensor(row[span]).to(rows_VD.device)].float()).sum(1)
            gain_LV += (gradient_LD @ rows_VD.float().T - now_L[:, None]).cpu()
    return gain_LV


def _table(model: LanguageModel) -> Any:
    """The module that embeds tokens."""
    network: Any = model.network
    return network.get_input_embeddings()


def _differentiable(model: LanguageModel, ids_1T: Tensor) -> tuple[Tensor, Tensor]:
    """The embeddings (1, T, D) of a row, and the logits after it (V,) as a function of them."""
    kept: list[Tensor] = []

    def leaf(module: Any, given: Any, output: Tensor) -> Tensor:
        kept.append(output.detach().requires_grad_(True))
        return kept[-1]

    hook = _table(model).register_forward_hook(leaf)
    try:
        with torch.enable_grad(), model.switch():
            module: Any = model.module
            out = module(input_ids=model.numbering.ids(ids_1T).to(model.device), use_cache=False)
    finally:
        hook.remove()
    return kept[0], out.logits[0, -1]


VARIANT = Guided
