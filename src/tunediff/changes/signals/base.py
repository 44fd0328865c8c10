"""The interface of a signal (`Signal`, `Tally`), and `read`, the one pass over text that feeds all signals."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tunediff.harvests.samples import batches_of
from tunediff.models.pair import Pair
from tunediff.models.passes import Start
from tunediff.records.measure import SignalTable
from tunediff.texts.document import Document
from tunediff.texts.tokens import Batch, Tokens

CHUNK_VALUES = 4 << 20
"""Largest number of log-probabilities of one model held at a time (16 MiB); a pass with all signals stays below 300 MB.
"""

SNIPPET = 160
"""Longest excerpt of text in a table, in characters."""

TOKEN = 40
"""Longest token in a table, in characters."""


class Tally(ABC):
    """The running sums of one signal and a few positions, never log-probabilities.

    Decoded text is untrusted. A table holds the text unescaped and cut to length; the code that shows a table must
    escape it.
    """

    def __init__(self, tokenizer: Any, vocabulary: int):
        self.tokenizer, self.vocabulary = tokenizer, vocabulary

    @abstractmethod
    def update(
        self, batch: Batch, tokens: Tokens, base_logp_NV: Tensor, tuned_logp_NV: Tensor, chosen_BT: Tensor
    ) -> None:
        """Add both models' next-token log-probabilities at the N chosen tokens, in row-major order.

        A batch may come in several calls, each with other chosen tokens. Do not change or keep the tensors.
        """

    @abstractmethod
    def table(self) -> SignalTable:
        """The table of everything read so far."""

    def text(self, ids: Sequence[int], limit: int = SNIPPET) -> str:
        """The decoded ids, unescaped and cut to `limit` characters."""
        text: str = self.tokenizer.decode(list(ids))
        return text if len(text) <= limit else text[: limit - 1] + "…"


@dataclass(frozen=True)
class Signal(ABC):
    """Base class of signals: a dataclass of settings with a method `begin`.

    A signal's name is its file's name. Each setting is ``find.NAME.field``, with a docstring under it.
    """

    @abstractmethod
    def begin(self, tokenizer: Any, vocabulary: int) -> Tally:
        """Return an empty tally over the first `vocabulary` tokens of `tokenizer`."""


def read(
    pair: Pair,
    tokens: Tokens,
    rows: Sequence[int],
    signals: Sequence[Signal],
    batch_tokens: int,
    progress: Callable[[int, int], None] | None = None,
    starts: Callable[[Batch], tuple[Start | None, Start | None]] | None = None,
) -> list[SignalTable]:
    """Run both models over some rows once, feed all signals, and return their tables in the signals' order.

    rows       row numbers in `tokens`, in any order
    progress   called with (tokens done, all tokens)
    starts     returns where base and tuned may start on a batch, if their streams are known

    Without `starts`, blocks below the first that fine-tuning changed run once for both models.
    """
    tallies = [signal.begin(pair.tokenizer, pair.vocabulary) for signal in signals]
    rows = sorted(set(rows))
    total, done = sum(len(tokens.rows[row]) for row in rows), 0
    size = max(1, CHUNK_VALUES // pair.vocabulary)
    for batch in batches_of(tokens, rows, batch_tokens):
        base_start, tuned_start = starts(batch) if starts else (None, None)
        if base_start is None:
            base_BTD, tuned_BTD, _ = pair.both_states(batch.ids_BT, wanted_BT=batch.mask_BT)
        else:
            base_BTD = pair.base.states(batch.ids_BT, base_start, batch.mask_BT)
            tuned_BTD = pair.tuned.states(batch.ids_BT, tuned_start, batch.mask_BT)
        for chosen_BT in _pieces(batch.mask_BT, size):
            base_logp = pair.base.logits(base_BTD[chosen_BT])[:, : pair.vocabulary].log_softmax(-1)
            tuned_logp = pair.tuned.logits(tuned_BTD[chosen_BT])[:, : pair.vocabulary].log_softmax(-1)
            for tally in tallies:
                tally.update(batch, tokens, base_logp, tuned_logp, chosen_BT)
        done += int(batch.mask_BT.sum())
        if progress:
            progress(done, total)
    return [tally.table() for tally in tallies]


def label(document: Document) -> str:
    """The kind of a text; text that a model wrote is labeled separately."""
    return f"{document.kind} by {document.writer}" if document.writer else document.kind


def documents_of(batch: Batch, tokens: Tokens, b_N: Tensor) -> list[int]:
    """The document number of each chosen token, given the row `b_N` of the batch that holds the token."""
    of_B = [tokens.document_R[row] for row in batch.rows_B.tolist()]
    return [of_B[b] for b in b_N.tolist()]


def _pieces(mask_BT: Tensor, size: int) -> Iterator[Tensor]:
    """Split `mask_BT` into masks of at most `size` tokens each, in row-major order."""
    for part in mask_BT.flatten().nonzero()[:, 0].split(size):
        piece = torch.zeros(mask_BT.numel(), dtype=torch.bool)
        piece[part] = True
        yield piece.view_as(mask_BT)
