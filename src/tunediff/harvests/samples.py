"""Samples: whole rows of one split with both models' streams, on which the models can run again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tunediff.core.axes import BASE, TUNED
from tunediff.core.chance import seed_of
from tunediff.harvests.harvest import Harvest
from tunediff.models.passes import Start
from tunediff.records.change import Change
from tunediff.records.site import Site
from tunediff.texts.tokens import Batch, Tokens


@dataclass(frozen=True, eq=False)
class Sample:
    """Whole rows with both models' streams at a harvest's sites, as flat tokens in the order of the rows.

    streams_NSMD   streams of both models
    row_N, position_N, document_N   row, position in the row, and document of each token
    ordinary_N     False for outlier tokens (`HarvestSettings.abnormal`), which are included to keep rows whole
    scored_N       whether a token's next-token prediction counts: in a chat those of the last answer, else all
    token_N        index of each token in the harvest
    """

    tokens: Tokens
    rows: list[int]
    sites: tuple[Site, ...]
    streams_NSMD: Tensor
    row_N: Tensor
    position_N: Tensor
    document_N: Tensor
    ordinary_N: Tensor
    scored_N: Tensor
    token_N: Tensor

    @classmethod
    def take(
        cls, harvest: Harvest, tokens: Tokens, *, split: str, limit: int, seed: int, kinds: Sequence[str] = ()
    ) -> Sample:
        """Take whole documents of one split, in an order fixed by `seed`, until `limit` tokens are reached.

        kinds   only documents of these kinds, all of them if empty
        """
        held = split == "held_out"
        rows_of: dict[int, list[int]] = {}
        for row, document in enumerate(tokens.document_R):
            if tokens.held_out[document] == held and (not kinds or tokens.documents[document].kind in kinds):
                rows_of.setdefault(document, []).append(row)
        rows: list[int] = []
        count = 0
        for document in sorted(rows_of, key=lambda d: seed_of(seed, "sample", tokens.documents[d].id)):
            if count >= limit:
                break
            rows += rows_of[document]
            count += sum(len(tokens.rows[row]) for row in rows_of[document])
        return cls.of(harvest, tokens, rows)

    @classmethod
    def of(cls, harvest: Harvest, tokens: Tokens, rows: Sequence[int]) -> Sample:
        """Take these rows."""
        rows = sorted(rows)
        wanted = torch.zeros(len(tokens.rows), dtype=torch.bool)
        wanted[rows] = True
        index = wanted[harvest.row_N].nonzero()[:, 0]
        order = torch.argsort(harvest.row_N[index].long() * (1 << 20) + harvest.position_N[index], stable=True)
        index = index[order]
        first_R = torch.tensor(tokens.prompt_R) - 1  # the last token of the prompt predicts the answer's first
        return cls(
            tokens,
            rows,
            harvest.sites,
            harvest.at(index),
            harvest.row_N[index],
            harvest.position_N[index],
            harvest.document_N[index],
            harvest.ordinary_N[index],
            harvest.position_N[index] >= first_R[harvest.row_N[index].long()],
            index,
        )

    def strength(self, change: Change) -> Tensor:
        """Return the change's strength at every token; 0 at outlier tokens, which no finder has seen."""
        at = [self.sites.index(site) for site in change.sites]
        some = (
            self.streams_NSMD if at == list(range(len(self.sites))) else self.streams_NSMD[:, at]
        )  # all sites, the usual case, need no copy
        return change.strength(some) * self.ordinary_N

    def places(self, batch: Batch) -> Tensor:
        """Return the sample's token index at each position of a batch of its rows (B, T); -1 for padding."""
        starts = {row: place for place, row in reversed(list(enumerate(self.row_N.tolist())))}
        first_B = torch.tensor([starts[row] for row in batch.rows_B.tolist()])
        return torch.where(batch.mask_BT, first_B[:, None] + torch.arange(batch.ids_BT.shape[1]), -1)

    def starts(self, batch: Batch) -> tuple[Start, Start] | tuple[None, None]:
        """Return starting points of base and tuned on a batch of the sample's rows: streams at the last resid site."""
        site = next((site for site in reversed(self.sites) if site.kind == "resid"), None)
        if site is None:
            return None, None
        stream_BTMD = self.streams_NSMD[:, self.sites.index(site)][self.places(batch).clamp_min(0)]
        return Start(site, stream_BTMD[:, :, BASE]), Start(site, stream_BTMD[:, :, TUNED])

    def only(self, rows: Sequence[int]) -> Sample:
        """Return the sample restricted to some of its rows."""
        wanted = torch.zeros(len(self.tokens.rows), dtype=torch.bool)
        wanted[list(rows)] = True
        keep = wanted[self.row_N.long()]
        return replace(
            self,
            rows=sorted(rows),
            **{
                name: getattr(self, name)[keep]
                for name in ("streams_NSMD", "row_N", "position_N", "document_N", "ordinary_N", "scored_N", "token_N")
            },
        )

    def batches(self, batch_tokens: int) -> Iterator[Batch]:
        """Yield the sample's rows in batches, with row numbers as in `tokens`."""
        return batches_of(self.tokens, self.rows, batch_tokens)


def batches_of(tokens: Tokens, rows: Sequence[int], batch_tokens: int) -> Iterator[Batch]:
    """Yield some rows in batches, with row numbers as in `tokens`."""
    for batch in tokens.only(rows).batches(batch_tokens):
        yield replace(batch, rows_B=torch.tensor(list(rows))[batch.rows_B])


def spread_rows(tokens: Tokens, limit: int, *kinds: str) -> list[int]:
    """Return training rows of the given kinds (of all if there is none) up to `limit` tokens, evenly over the corpus."""
    train = [r for r, d in enumerate(tokens.document_R) if not tokens.held_out[d]]
    rows = [r for r in train if tokens.documents[tokens.document_R[r]].kind in kinds] or train
    total = sum(len(tokens.rows[r]) for r in rows)
    stride = max(1, total // max(1, limit))
    return rows[::stride]
