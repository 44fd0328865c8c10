"""KL map: the kinds of text, and the positions, at which both models' next-token predictions differ most."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from tunediff.changes.signals.base import TOKEN, Signal, Tally, documents_of, label
from tunediff.core.chance import bootstrap_ratio
from tunediff.core.errors import within
from tunediff.records.measure import SignalTable
from tunediff.texts.document import Document
from tunediff.texts.tokens import Batch, Tokens


@dataclass
class _Seen:
    """Running sums of one document: nats, tokens, and the tokens with the highest KL as (KL, -row, -position)."""

    document: Document
    nats: float = 0.0
    tokens: int = 0
    peaks: list[tuple[float, int, int]] = field(default_factory=list)


@dataclass(frozen=True)
class KlMap(Signal):
    """KL(tuned || base) of the next-token prediction in nats, by kind of text and by document.

    Every other finding accounts for a part of these numbers at most. Intervals are percentile bootstraps over
    documents; both answers to one prompt count as one document. The map shows where the models differ, not why.
    """

    documents: int = 12
    """Largest number of documents in the table, by descending mean KL."""
    peaks: int = 4
    """Number of highest-KL tokens shown for each document."""
    before: int = 24
    """Number of tokens shown before a document's highest-KL token."""
    after: int = 8
    """Number of tokens shown from the highest-KL token on."""
    shortest: int = 8
    """Fewest tokens of a document in the table; a single token would decide a shorter document's mean."""

    def __post_init__(self) -> None:
        within("find.kl_map", self, documents=0, peaks=1, before=0, after=1, shortest=1)

    def begin(self, tokenizer: Any, vocabulary: int) -> Tally:
        return _Map(self, tokenizer, vocabulary)


class _Map(Tally):
    """Running sums of `KlMap`."""

    def __init__(self, by: KlMap, tokenizer: Any, vocabulary: int):
        super().__init__(tokenizer, vocabulary)
        self.by = by
        self.seen: dict[str, _Seen] = {}
        self.rows: dict[int, tuple[int, ...]] = {}

    def update(
        self, batch: Batch, tokens: Tokens, base_logp_NV: Tensor, tuned_logp_NV: Tensor, chosen_BT: Tensor
    ) -> None:
        kl_N = (tuned_logp_NV.exp() * (tuned_logp_NV - base_logp_NV)).sum(-1).clamp_min(0).tolist()
        b_N, t_N = chosen_BT.nonzero(as_tuple=True)
        rows_B = batch.rows_B.tolist()
        for kl, b, t, d in zip(kl_N, b_N.tolist(), t_N.tolist(), documents_of(batch, tokens, b_N)):
            document = tokens.documents[d]
            seen = self.seen.setdefault(document.id, _Seen(document))
            seen.nats += kl
            seen.tokens += 1
            peak = (kl, -rows_B[b], -t)
            if len(seen.peaks) < self.by.peaks:
                heapq.heappush(seen.peaks, peak)
            elif peak > seen.peaks[0]:
                heapq.heapreplace(seen.peaks, peak)
            self.rows[rows_B[b]] = tokens.rows[rows_B[b]]

    def table(self) -> SignalTable:
        everything = [self.seen[id] for id in sorted(self.seen)]
        rows = [self._mean("all text", everything)] if everything else []
        kinds = sorted({label(s.document) for s in everything})
        by_kind = [self._mean(kind, [s for s in everything if label(s.document) == kind]) for kind in kinds]
        rows += sorted(by_kind, key=lambda row: (-row[2], row[1]))
        long = [s for s in everything if s.tokens >= self.by.shortest and s.nats > 0]
        long.sort(key=lambda s: (-s.nats / s.tokens, s.document.id))
        rows += [self._document(s) for s in long[: self.by.documents]]
        return SignalTable(
            "kl_map",
            "Where the models differ in what they say next",
            "KL(tuned || base) of the next-token prediction, mean over tokens, with 95 % bootstrap intervals "
            "over documents; below, the documents with the highest mean (the extremes of many: no interval "
            "would be honest), each around its highest token. 0 is what a model against itself gives.",
            ["what", "name", "KL (nat a token)", "low", "high", "tokens", "highest after", "text"],
            rows,
        )

    @staticmethod
    def _mean(name: str, of: Sequence[_Seen]) -> list[Any]:
        groups: dict[str, list[float]] = {}
        for seen in of:
            sums = groups.setdefault(seen.document.group or seen.document.id, [0.0, 0.0])
            sums[0] += seen.nats
            sums[1] += seen.tokens
        nats, tokens = zip(*(groups[g] for g in sorted(groups)))
        kl = bootstrap_ratio(nats, tokens, seed=0)
        ends = [round(kl.low, 6), round(kl.high, 6)] if len(groups) > 1 else [None, None]
        return ["text", name, round(kl.value, 6), *ends, int(sum(tokens)), "", ""]

    def _document(self, seen: _Seen) -> list[Any]:
        peaks = [(kl, -row, -t) for kl, row, t in sorted(seen.peaks, reverse=True)]
        _, row, t = peaks[0]
        after = " · ".join(f"{self.text([self.rows[r][p]], TOKEN)!r} {kl:.2f}" for kl, r, p in peaks if kl > 0)[:240]
        window = self.rows[row][max(0, t - self.by.before) : t + self.by.after]
        name = f"{label(seen.document)}: {seen.document.id}"[:120]
        return ["document", name, round(seen.nats / seen.tokens, 6), None, None, seen.tokens, after, self.text(window)]


VARIANT = KlMap
