"""Attributions: how far the output moves at each token, where to, and how much of that goes when a change is taken out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Iterator, Sequence

import torch
from torch import Tensor

from tunediff.axes import BASE, TUNED
from tunediff.changes import Change
from tunediff.measures import kl_divergence, log_probabilities
from tunediff.models import LanguageModel, Start
from tunediff.pairs import Pair
from tunediff.samples import Sample
from tunediff.sites import Site


SAID = 16
"""Tokens kept of those that tuned says more of at a place."""


@dataclass(frozen=True, eq=False)
class Shift:
    """How the output moves at each of N tokens: KL(tuned || base) in nat (N,), and the vocabulary tokens whose probability
    rises the most, ids and rise (N, 16); all 0 where it was not looked at."""

    kl_N: Tensor
    said_NK: Tensor
    rise_NK: Tensor

    @classmethod
    def none(cls, count: int) -> "Shift":
        """No move at `count` tokens."""
        return cls(torch.zeros(count), torch.zeros(count, SAID, dtype=torch.int32), torch.zeros(count, SAID))

    def at(self, tokens_N: Tensor) -> "Shift":
        """The move at some of the tokens."""
        return Shift(self.kl_N[tokens_N], self.said_NK[tokens_N], self.rise_NK[tokens_N])

    def put(self, tokens_N: Tensor, other: "Shift") -> None:
        """Take over what another has seen of some tokens."""
        for name, value in vars(other).items():
            getattr(self, name)[tokens_N] = value


def output_shift(pair: Pair, site: Site, sample: Sample, batch_tokens: int) -> Shift:
    """The move at the sample's scored tokens; runs only the blocks above `site`."""
    shift = Shift.none(len(sample.row_N))
    kept = min(SAID, pair.vocabulary)
    for where_N, _, _, _, _, base, tuned, kl_N in _shifts(pair, site, sample, batch_tokens):
        rise, said = (tuned.exp() - base.exp()).topk(kept)
        shift.kl_N[where_N] = kl_N
        shift.rise_NK[where_N, :kept] = rise.clamp_min(0)
        shift.said_NK[where_N, :kept] = said.int()
    return shift


def removed(pair: Pair, changes: Sequence[Change], f_NK: Tensor, sample: Sample, batch_tokens: int) -> tuple[Tensor, Tensor]:
    """KL(tuned || base) in nat at the sample's scored tokens, 0 at the others, (N,); and how much less it is, (N, K), with
    each change alone taken out of tuned's stream at its last site.

    f_NK   the changes' strengths on the sample; only rows in which a change is on are run for it
    """
    kl_N, less_NK = torch.zeros(len(sample.row_N)), torch.zeros(f_NK.shape)
    for site in sorted({change.sites[-1] for change in changes}):
        if site.kind != "resid":
            continue  # runs start from streams only
        mine = [k for k, change in enumerate(changes) if change.sites[-1] == site]
        for _, ids_BT, at_BT, chosen_BT, stream_BTMD, base, _, kl in _shifts(pair, site, sample, batch_tokens):
            kl_N[at_BT[chosen_BT]] = kl
            f_BTK = f_NK[at_BT.clamp_min(0)] * (at_BT >= 0)[..., None]
            row_of_kl = chosen_BT.nonzero()[:, 0]
            for k in mine:
                on_B = f_BTK[..., k].any(1) & chosen_BT.any(1)
                if not on_B.any():
                    continue
                write_D = changes[k].difference_SD[-1].float()
                start = Start(site, stream_BTMD[on_B][:, :, TUNED] - f_BTK[on_B][..., k, None] * write_D)
                edited = log_probabilities(pair.tuned, ids_BT[on_B], chosen_BT[on_B], pair.vocabulary, start)
                these = on_B[row_of_kl]
                less_NK[at_BT[on_B][chosen_BT[on_B]], k] = kl[these] - kl_divergence(edited, base[these])
    return kl_N, less_NK


def _shifts(pair: Pair, site: Site, sample: Sample, batch_tokens: int) -> Iterator[tuple]:
    """For each batch: places of its scored tokens in the sample, ids, the place of each position (-1: padding), which
    positions are scored, both streams at `site`, both log-probabilities and KL(tuned || base) at scored tokens."""
    s = sample.sites.index(site)
    for batch in sample.batches(batch_tokens):
        at_BT = sample.places(batch)
        stream_BTMD = sample.streams_NSMD[:, s][at_BT.clamp_min(0)]
        chosen_BT = sample.scored_N[at_BT.clamp_min(0)] & batch.mask_BT

        def logp(model: LanguageModel, m: int) -> Tensor:
            return log_probabilities(model, batch.ids_BT, chosen_BT, pair.vocabulary, Start(site, stream_BTMD[:, :, m]))

        base, tuned = logp(pair.base, BASE), logp(pair.tuned, TUNED)
        yield at_BT[chosen_BT], batch.ids_BT, at_BT, chosen_BT, stream_BTMD, base, tuned, kl_divergence(tuned, base)
