"""Attributions: how far the output moves at each token, where to, and how much of that each place in a stream makes."""

from __future__ import annotations

from typing import Iterator

import torch
from torch import Tensor

from tunediff.axes import BASE, TUNED
from tunediff.measures import kl_divergence, log_probabilities
from tunediff.models import LanguageModel, Start
from tunediff.pairs import Pair
from tunediff.samples import Sample
from tunediff.sites import Site


def attribute(pair: Pair, site: Site, sample: Sample, batch_tokens: int) -> tuple[Tensor, Tensor]:
    """Gradient (N, D) of the summed KL(tuned || base) by the stream at `site`, and the KL (N,) itself in nat.

    Both over the sample's scored tokens; 0 at the others. Taken halfway between base's stream and tuned's, continued in
    tuned's upper blocks: the midpoint rule for the path from one to the other (attribution patching, Syed et al. 2023,
    2310.10348, takes an end of it).
    """
    gradient_ND = torch.zeros(len(sample.row_N), sample.streams_NSMD.shape[-1])
    kl_N = torch.zeros(len(sample.row_N))
    for where_N, ids_BT, at_BT, chosen_BT, stream_BTMD, base_logp_NV, _, part in _shifts(pair, site, sample, batch_tokens):
        kl_N[where_N] = part
        got = pair.tuned.gradient(site, stream_BTMD.mean(2), ids_BT, chosen_BT, base_logp_NV)
        gradient_ND[at_BT[at_BT >= 0]] = got[at_BT >= 0]
    return gradient_ND, kl_N


def output_shift(pair: Pair, site: Site, sample: Sample, batch_tokens: int) -> tuple[Tensor, Tensor]:
    """KL(tuned || base) in nat at the sample's scored tokens, 0 at the others, (N,), and where the prediction moves (N, D):
    the change of the mean unembedding row, centered rows weighted by probability. Runs only the blocks above `site`."""
    kl_N = torch.zeros(len(sample.row_N))
    move_ND = torch.zeros(len(sample.row_N), sample.streams_NSMD.shape[-1])
    rows_VD = pair.base.family.unembedding(pair.base.network).weight[: pair.vocabulary].float()
    rows_VD = rows_VD - rows_VD.mean(0)
    for where_N, _, _, _, _, base, tuned, part in _shifts(pair, site, sample, batch_tokens):
        kl_N[where_N] = part
        move_ND[where_N] = (tuned.exp() - base.exp()) @ rows_VD
    return kl_N, move_ND


def _shifts(pair: Pair, site: Site, sample: Sample, batch_tokens: int) -> Iterator[tuple]:
    """For each batch: places of its scored tokens in the sample, ids, the place of each position (-1: padding), which
    positions are scored, both streams at `site`, both log-probabilities and KL(tuned || base) at scored tokens."""
    s = sample.sites.index(site)
    starts = {row: place for place, row in reversed(list(enumerate(sample.row_N.tolist())))}
    for batch in sample.batches(batch_tokens):
        rows = torch.tensor([starts[row] for row in batch.rows_B.tolist()])
        at_BT = rows[:, None] + torch.arange(batch.ids_BT.shape[1])
        at_BT = torch.where(batch.mask_BT, at_BT, -1)
        stream_BTMD = sample.streams_NSMD[:, s][at_BT.clamp_min(0)]
        chosen_BT = sample.scored_N[at_BT.clamp_min(0)] & batch.mask_BT

        def logp(model: LanguageModel, m: int) -> Tensor:
            return log_probabilities(model, batch.ids_BT, chosen_BT, pair.vocabulary, Start(site, stream_BTMD[:, :, m]))

        base, tuned = logp(pair.base, BASE), logp(pair.tuned, TUNED)
        yield at_BT[chosen_BT], batch.ids_BT, at_BT, chosen_BT, stream_BTMD, base, tuned, kl_divergence(tuned, base)
