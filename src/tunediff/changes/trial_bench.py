"""The trial bench of one change: rows on which the change is on, both models' streams there, and runs from edited
streams.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice

import torch
from torch import Tensor

from tunediff.changes.trials.base import VerifySettings
from tunediff.core.axes import BASE, TUNED
from tunediff.core.chance import generator
from tunediff.harvests.harvest import Harvest
from tunediff.harvests.samples import Sample
from tunediff.models.divergences import Divergence, Said, by_document, kl_divergence
from tunediff.models.network import LanguageModel
from tunediff.models.pair import Pair
from tunediff.models.passes import Start
from tunediff.records.change import Change
from tunediff.records.site import Site
from tunediff.texts.tokens import Batch

SCORED_A_RUN = 640
"""Largest number of scored tokens in one run; several interventions share a run up to this number."""

SPREAD_TOKENS = 20_000
"""Largest number of training tokens from which the mean and covariance of the difference are computed."""


@dataclass(frozen=True, eq=False)
class Spread:
    """Mean (D,) and a square root (D, D) of the covariance of the difference at one site, on training tokens."""

    mean_D: Tensor
    root_DD: Tensor

    @classmethod
    def of(cls, delta_ND: Tensor) -> Spread:
        """The mean and covariance of a sample of the difference."""
        mean_D = delta_ND.mean(0)
        values, vectors = torch.linalg.eigh((delta_ND - mean_D).T @ (delta_ND - mean_D) / len(delta_ND))
        return cls(mean_D, values.clamp_min(0).sqrt()[:, None] * vectors.T)


def spreads(harvest: Harvest) -> dict[Site, Spread]:
    """The spread of the difference at every site of a harvest."""
    x_NSMD = harvest.at(harvest.index("train")[:SPREAD_TOKENS])
    return {site: Spread.of(x_NSMD[:, s, TUNED] - x_NSMD[:, s, BASE]) for s, site in enumerate(harvest.sites)}


@dataclass(eq=False)
class TrialBench:
    """The rows on which one change is tested: both models' streams and next-token distributions, cached.

    Interventions replace the stream at `site` and run only the blocks above. ``scored_BT`` are the tokens at and after
    the change's first firing in a row, because a change cannot reach earlier ones. Tokens that do not count in the
    sample are left out.
    """

    pair: Pair
    site: Site
    change: Change
    batch: Batch
    streams_BTMD: Tensor
    strength_BT: Tensor
    counts_BT: Tensor
    documents_B: list[int]
    seed: int
    everything_BTD: Tensor
    spread: Spread
    draws: int
    limit: int

    @cached_property
    def scored_BT(self) -> Tensor:
        """The tokens that the change can reach, thinned evenly to the limit."""
        reached = ((self.strength_BT != 0).cumsum(1) > 0) & self.counts_BT
        places = reached.flatten().nonzero()[:, 0]
        kept = torch.zeros(reached.numel(), dtype=torch.bool)
        kept[places[torch.linspace(0, len(places) - 1, min(self.limit, len(places))).round().long()]] = True
        return kept.view_as(reached)

    @cached_property
    def difference_D(self) -> Tensor:
        """The vector (D,) that a unit of the change's strength adds to tuned."""
        return self.change.difference_SD[self.change.sites.index(self.site)].float()

    def logp(self, model: LanguageModel, stream_BTD: Tensor) -> Tensor:
        """Log-probabilities (N, V) at scored tokens when `model` runs from this stream."""
        return next(self._said(model, [stream_BTD])).logp()[0]

    def to_base(self, model: LanguageModel, streams: Iterable[Tensor]) -> Iterator[Tensor]:
        """KL(`model` run from the stream || base), (N,), for each of many streams."""
        return (kl_N for said in self._said(model, streams) for kl_N in kl_divergence(said, self.base_logp))

    def from_tuned(self, model: LanguageModel, streams: Iterable[Tensor]) -> Iterator[Tensor]:
        """KL(tuned || `model` run from the stream), (N,), for each of many streams."""
        return (kl_N for said in self._said(model, streams) for kl_N in kl_divergence(self.tuned_logp, said))

    def weighed(self, model: LanguageModel, streams: Iterable[Tensor], weight_NV: Tensor) -> Iterator[Tensor]:
        """Weighted sums (N,) of the logits at scored tokens when `model` runs from each of many streams."""
        for said in self._said(model, streams):
            for one_ND in said.states_ND:
                yield (replace(said, states_ND=one_ND).logits().cpu() * weight_NV).sum(-1)

    def _said(self, model: LanguageModel, streams: Iterable[Tensor]) -> Iterator[Said]:
        """The outputs of `model` at scored tokens (R, N), run from each of R streams, several streams a run."""
        streams = iter(streams)
        while some := list(islice(streams, max(1, SCORED_A_RUN // max(1, int(self.scored_BT.sum()))))):
            said = Said.at(
                model,
                self.batch.ids_BT.repeat(len(some), 1),
                self.scored_BT.repeat(len(some), 1),
                self.pair.vocabulary,
                Start(self.site, torch.cat(some)),
            )
            yield replace(said, states_ND=said.states_ND.unflatten(0, (len(some), int(self.scored_BT.sum()))))

    @cached_property
    def base_logp(self) -> Tensor:
        """Base's log-probabilities (N, V) at scored tokens."""
        return self.logp(self.pair.base, self.streams_BTMD[:, :, BASE])

    @cached_property
    def tuned_logp(self) -> Tensor:
        """Tuned's log-probabilities (N, V) at scored tokens."""
        return self.logp(self.pair.tuned, self.streams_BTMD[:, :, TUNED])

    @cached_property
    def document_N(self) -> Tensor:
        """The document of every scored token, (N,)."""
        rows = torch.tensor(self.documents_B)[:, None].expand_as(self.scored_BT)
        return rows[self.scored_BT]

    @cached_property
    def documents(self) -> list[int]:
        """The documents with a scored token."""
        return sorted(set(self.document_N.tolist()))

    @cached_property
    def gap_N(self) -> Tensor:
        """KL(tuned || base) at scored tokens, (N,)."""
        return kl_divergence(self.tuned_logp, self.base_logp)

    def by_document(self, kl_N: Tensor) -> Divergence:
        """Sums of a divergence at scored tokens, by document."""
        return by_document(kl_N, self.document_N, self.documents)

    @cached_property
    def random_directions_RD(self) -> Tensor:
        """Random directions of the change's length, drawn from the covariance of the difference.

        With the change's own strengths, the directions have its energy at every token. Directions in which the models
        do not differ would be too easy a control. The directions are orthogonal to the change's own direction, which
        would be no control. A dense change must beat all directions, so its controls keep their part along it.
        """
        rng = generator(self.seed, "random directions", self.change.id)
        own = torch.nn.functional.normalize(self.difference_D, dim=0)
        noise = torch.randn(self.draws, len(own), generator=rng) @ self.spread.root_DD
        if not self.is_dense:
            noise = noise - (noise @ own)[:, None] * own
        # A difference along this one direction alone leaves nothing orthogonal: take any direction then.
        bare = noise.norm(dim=1) < 1e-6 * self.spread.root_DD.norm()
        noise[bare] = torch.randn(int(bare.sum()), len(own), generator=rng)
        return torch.nn.functional.normalize(noise, dim=1) * self.difference_D.norm()

    @property
    def is_dense(self) -> bool:
        """Whether the change is on everywhere, so that its strength is a coordinate of the difference and not an event."""
        return self.change.threshold == float("-inf") and bool(self.change.rows_SMD.any())

    @property
    def written_BTD(self) -> Tensor:
        """What the change adds to tuned, (B, T, D)."""
        return self.strength_BT[..., None] * self.difference_D

    def controls(self, draws: int | None = None) -> Iterator[Tensor]:
        """What each control adds (B, T, D), along a random direction.

        Controls of a change that is on at some tokens use the change's strengths. A dense change reads the difference
        along its direction, so it removes some of the difference whatever the direction. Its controls therefore read
        the difference along their own directions, scaled to the change's energy.
        """
        centered_BTD = self.streams_BTMD[:, :, TUNED] - self.streams_BTMD[:, :, BASE] - self.spread.mean_D
        for direction_D in self.random_directions_RD[:draws]:
            strength_BT = self.strength_BT
            if self.is_dense:
                own_BT = (centered_BTD @ direction_D) * (strength_BT != 0)
                strength_BT = own_BT * (strength_BT.norm() / own_BT.norm().clamp_min(1e-30))
            yield strength_BT[..., None] * direction_D


def trial_bench(
    pair: Pair,
    change: Change,
    others: list[Change],
    sample: Sample,
    spread: Spread,
    settings: VerifySettings,
    seed: int,
) -> TrialBench | None:
    """The bench of one change on a held-out sample, at the change's last site; None if it is on nowhere."""
    site = change.sites[-1]
    s = sample.sites.index(site)
    f_N = sample.strength(change)
    # An answer is tested from its first token on, however long its prompt is.
    end_of = {row: max(sample.tokens.prompt_R[row] - 1, 0) + settings.tokens for row in sample.rows}
    energy: dict[int, float] = {}
    for row in sample.rows:
        mine = (sample.row_N == row) & (sample.position_N < end_of[row])
        value = float(f_N[mine].double().pow(2).sum())
        document = sample.tokens.document_R[row]
        if value > 0 and (document not in energy or value > energy[document][0]):
            energy[document] = (value, row)
    chosen = sorted(energy.values(), reverse=True)[: settings.documents]
    if not chosen:
        return None
    rows = sorted(row for _, row in chosen)
    few = sample.only(rows)
    f_N, everything_N = (
        few.strength(change),
        sum(
            (few.strength(c)[:, None] * c.difference_SD[c.sites.index(site)].float() for c in others),
            torch.zeros_like(few.streams_NSMD[:, s, 0]),
        ),
    )
    batch = next(sample.tokens.only(rows).batches(10**9, order="rows"))
    width = min(max(end_of[row] for row in rows), batch.ids_BT.shape[1])
    batch = Batch(batch.ids_BT[:, :width], batch.mask_BT[:, :width], torch.tensor(rows))
    B, D = len(rows), sample.streams_NSMD.shape[-1]
    streams, strength = torch.zeros(B, width, 2, D), torch.zeros(B, width)
    counts = torch.zeros(B, width, dtype=torch.bool)
    everything = torch.zeros(B, width, D)
    for b, row in enumerate(batch.rows_B.tolist()):
        here = (few.row_N == row).nonzero()[: min(end_of[row], width), 0]
        streams[b, : len(here)] = few.streams_NSMD[here, s]
        strength[b, : len(here)] = f_N[here]
        counts[b, : len(here)] = few.scored_N[here]
        everything[b, : len(here)] = everything_N[here]
    bench = TrialBench(
        pair,
        site,
        change,
        batch,
        streams,
        strength,
        counts,
        [sample.tokens.document_R[row] for row in batch.rows_B.tolist()],
        seed,
        everything,
        spread,
        settings.draws,
        settings.scored,
    )
    return bench if bench.scored_BT.any() else None
