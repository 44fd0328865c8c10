"""Attributions: how far and where the output moves at each token, and how much of it each change accounts for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tunediff.core.artifacts import read_tensors, write_tensors
from tunediff.core.axes import BASE, TUNED
from tunediff.harvests.samples import Sample
from tunediff.models.divergences import Said, blocks, kl_divergence
from tunediff.models.pair import Pair
from tunediff.models.passes import Start
from tunediff.records.change import Change
from tunediff.records.site import Site

SAID = 16
"""Number of vocabulary tokens kept at each position, by descending rise in probability."""


@dataclass(frozen=True, eq=False)
class Shift:
    """The output shift at each of N tokens; all 0 at tokens that were not scored.

    kl_N      KL(tuned || base), nat
    said_NK   ids of the K = 16 vocabulary tokens whose probability rises most
    rise_NK   rise in probability of each of them
    """

    kl_N: Tensor
    said_NK: Tensor
    rise_NK: Tensor

    @classmethod
    def none(cls, count: int) -> Shift:
        """A shift of 0 at `count` tokens."""
        return cls(torch.zeros(count), torch.zeros(count, SAID, dtype=torch.int32), torch.zeros(count, SAID))

    def at(self, tokens_N: Tensor) -> Shift:
        """The shift at some of the tokens."""
        return Shift(self.kl_N[tokens_N], self.said_NK[tokens_N], self.rise_NK[tokens_N])

    def put(self, tokens_N: Tensor, other: Shift) -> None:
        """Copy another shift's values to some of the tokens."""
        for name, value in vars(other).items():
            getattr(self, name)[tokens_N] = value

    def save(self, folder: Path) -> list[str]:
        """Write the shift to a folder; return the file's name, for a manifest."""
        write_tensors(folder / "shift.safetensors", vars(self))
        return ["shift.safetensors"]

    @classmethod
    def load(cls, folder: Path) -> Shift:
        """Read a shift that `save` wrote."""
        return cls(**read_tensors(folder / "shift.safetensors"))


def output_shift(pair: Pair, site: Site, sample: Sample, batch_tokens: int) -> Shift:
    """The shift at the sample's scored tokens; only the blocks above `site` run."""
    shift = Shift.none(len(sample.row_N))
    kept = min(SAID, pair.vocabulary)
    for where_N, _, _, _, _, base, tuned in _shifts(pair, site, sample, batch_tokens):
        for part, q, p in blocks(base, tuned):
            shift.kl_N[where_N[part]] = kl_divergence(p, q)
            rise, said = p.exp_().sub_(q.exp_()).topk(kept)
            shift.rise_NK[where_N[part], :kept] = rise.clamp_min(0)
            shift.said_NK[where_N[part], :kept] = said.int()
    return shift


def removed(
    pair: Pair, changes: Sequence[Change], f_NK: Tensor, sample: Sample, batch_tokens: int
) -> tuple[Tensor, Tensor]:
    """KL(tuned || base), nat, at the sample's scored tokens, and how much of it goes when each change is removed.

    Each change alone is subtracted from the tuned model's stream at its last site, and the blocks above run again. Only
    rows on which the change is on are run, and only changes whose last site is a residual stream are removed.

    f_NK   strengths of the changes on the sample

    Returns (N,), 0 at tokens that are not scored, and (N, K).
    """
    kl_N, less_NK = torch.zeros(len(sample.row_N)), torch.zeros(f_NK.shape)
    for site in sorted({change.sites[-1] for change in changes}):
        if site.kind != "resid":
            continue  # runs can start from residual streams only
        mine = [k for k, change in enumerate(changes) if change.sites[-1] == site]
        for where_N, ids_BT, at_BT, chosen_BT, stream_BTMD, base, tuned in _shifts(pair, site, sample, batch_tokens):
            base = base.logp()  # computed once, used for every change
            kl_N[where_N] = kl_divergence(tuned, base)
            f_BTK = f_NK[at_BT.clamp_min(0)] * (at_BT >= 0)[..., None]
            for k in mine:
                reached_BT = chosen_BT & ((f_BTK[..., k] != 0).cumsum(1) > 0)  # positions are causal
                on_B = reached_BT.any(1)
                if not on_B.any():
                    continue
                write_D = changes[k].difference_SD[-1].float()
                start = Start(site, stream_BTMD[on_B][:, :, TUNED] - f_BTK[on_B][..., k, None] * write_D)
                edited = Said.at(pair.tuned, ids_BT[on_B], reached_BT[on_B], pair.vocabulary, start)
                these_N = at_BT[reached_BT]
                less_NK[these_N, k] = kl_N[these_N] - kl_divergence(edited, base[reached_BT[chosen_BT]])
    return kl_N, less_NK


def _shifts(pair: Pair, site: Site, sample: Sample, batch_tokens: int) -> Iterator[tuple]:
    """For each batch, a tuple of what `output_shift` and `removed` need.

    where_N              indices of the scored tokens in the sample
    ids_BT, at_BT        token ids, and each position's index in the sample (-1 for padding)
    chosen_BT            which positions are scored
    stream_BTMD          both models' streams at `site`
    base, tuned          both models' outputs at scored tokens
    """
    s = sample.sites.index(site)
    for batch in sample.batches(batch_tokens):
        at_BT = sample.places(batch)
        stream_BTMD = sample.streams_NSMD[:, s][at_BT.clamp_min(0)]
        chosen_BT = sample.scored_N[at_BT.clamp_min(0)] & batch.mask_BT
        base, tuned = (
            Said.at(model, batch.ids_BT, chosen_BT, pair.vocabulary, Start(site, stream_BTMD[:, :, m]))
            for m, model in ((BASE, pair.base), (TUNED, pair.tuned))
        )
        yield at_BT[chosen_BT], batch.ids_BT, at_BT, chosen_BT, stream_BTMD, base, tuned
