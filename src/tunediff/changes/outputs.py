"""Outputs: both models' next-token distributions over all tokens that either has, and how a group of tokens moves there.

A change of weights after the last block (the unembedding, the final norm) and a token that only one model has leave no trace
in the difference of streams. What can be claimed of them is a group of tokens that tuned says more or less often than base.
KL(tuned || base) is infinite where base lacks a token that tuned says. So gaps are measured here as Jensen-Shannon
divergences (Lin 1991), which are at most ln 2, and the same for both orders of the models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from tunediff.changes.rankings import Ranked, RankSettings, by_documents, max_t, telling_rows
from tunediff.core.chance import Interval, bootstrap_ratio, seed_of
from tunediff.harvests.samples import Sample
from tunediff.models.divergences import TILE, Said
from tunediff.models.network import LanguageModel
from tunediff.models.pair import Pair
from tunediff.records.change import Change, TokenGroup

MOVED = 1e-6
"""Least probability a token that a random tune is taken to move, so that scores stay finite where none moves any."""


@dataclass(frozen=True, eq=False)
class Outputs:
    """Both models' next-token distributions at a sample's scored tokens, made when they are read.

    U tokens are numbered in one row: those that are compared (`Vocabularies.size` of them), then those that tuned has to
    itself, then those that base has to itself. A model gives no probability to a token that it lacks.
    """

    pair: Pair
    sample: Sample
    batch_tokens: int = 1200

    @property
    def shared(self) -> slice:
        """The tokens that are compared."""
        return slice(0, self.pair.vocabularies.size)

    @property
    def tuned_only(self) -> slice:
        """The tokens that tuned has to itself."""
        size = self.pair.vocabularies.size
        return slice(size, size + len(self.pair.vocabularies.tuned_only))

    @property
    def base_only(self) -> slice:
        """The tokens that base has to itself."""
        start = self.tuned_only.stop
        return slice(start, start + len(self.pair.vocabularies.base_only))

    def group(self, numbers: Sequence[int], raised: bool) -> TokenGroup:
        """The tokens of these numbers, with their names."""
        vocabularies, start = self.pair.vocabularies, self.base_only.start
        names = (
            vocabularies.name(0, n - start + vocabularies.size)
            if n >= start
            else vocabularies.name(int(n >= vocabularies.size or n in vocabularies.tuned_named), n)
            for n in numbers
        )
        return TokenGroup(tuple(numbers), tuple(names), raised)

    @cached_property
    def states(self) -> tuple[Tensor, Tensor, Tensor]:
        """The scored tokens' indices in the sample (n,), and base's and tuned's final normed states there (n, D)."""
        sample, found = self.sample, []
        for batch in sample.batches(self.batch_tokens):
            at_BT = sample.places(batch)
            chosen_BT = sample.scored_N[at_BT.clamp_min(0)] & batch.mask_BT
            if not chosen_BT.any():
                continue
            base, tuned = (
                model.states(batch.ids_BT, start, chosen_BT)[chosen_BT]
                for model, start in zip((self.pair.base, self.pair.tuned), sample.starts(batch))
            )
            found.append((at_BT[chosen_BT], base, tuned))
        nothing = torch.zeros(0, dtype=torch.long), torch.zeros(0, 1), torch.zeros(0, 1)
        where_N, base_ND, tuned_ND = (torch.cat(parts) for parts in zip(*(found or [nothing])))
        return where_N, base_ND, tuned_ND

    def _tiles(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield `states` in parts of at most `TILE` tokens."""
        return ((w, b, t) for w, b, t in zip(*(x.split(TILE) for x in self.states)) if len(w))

    def parts(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield the scored tokens in parts: their indices in the sample (n,), tuned's and base's probabilities (n, U)."""
        return ((where_N, *self.probabilities(base_ND, tuned_ND)) for where_N, base_ND, tuned_ND in self._tiles())

    def logits(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield the scored tokens in parts: their indices in the sample (n,), tuned's and base's logits (n, V) of the tokens
        that are compared."""
        V = self.pair.vocabulary
        for where_N, base_ND, tuned_ND in self._tiles():
            sides = ((self.pair.tuned, tuned_ND), (self.pair.base, base_ND))
            tuned_NV, base_NV = (m.logits(s.contiguous())[:, :V].float().cpu() for m, s in sides)
            yield where_N, tuned_NV, base_NV

    def probabilities(self, base_ND: Tensor, tuned_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Tuned's and base's probabilities (N, U) from their final normed states."""
        p_NC, q_NC = (
            m.logits(s.contiguous()).softmax(-1).cpu()
            for m, s in ((self.pair.tuned, tuned_ND), (self.pair.base, base_ND))
        )
        size = self.pair.vocabularies.size
        extra = (x.shape[1] - size for x in (p_NC, q_NC))
        tuned_own, base_own = (p_NC.new_zeros(len(p_NC), count) for count in extra)
        return torch.cat([p_NC, base_own], 1), torch.cat([q_NC[:, :size], tuned_own, q_NC[:, size:]], 1)

    def strengths(self, changes: Sequence[Change]) -> Tensor:
        """Strength (N, K) of changes at the output: the probability that their tokens gain, where above the threshold."""
        f_NK = torch.zeros(len(self.sample.row_N), len(changes))
        for where_N, p_NU, q_NU in self.parts():
            for k, change in enumerate(changes):
                f_NK[where_N, k] = gained(p_NU, q_NU, group_of(change)).sum(1)
        threshold_K = torch.tensor([change.threshold for change in changes])
        return torch.where(f_NK > threshold_K, f_NK, 0.0)

    def only(self, rows: Sequence[int]) -> Outputs:
        """The distributions on some of the sample's rows."""
        return Outputs(self.pair, self.sample.only(rows), self.batch_tokens)


def gained(p_NU: Tensor, q_NU: Tensor, group: TokenGroup) -> Tensor:
    """The probability (N, G) that each token of a group gains from base to tuned; that it loses, if the group is lowered."""
    numbers = list(group.numbers)
    return (p_NU[:, numbers] - q_NU[:, numbers]) * group.sign


def reweighed(p_NU: Tensor, q_NU: Tensor, numbers: Sequence[int]) -> Tensor:
    """The distributions p with the probabilities that q gives to some tokens; all others keep their proportions."""
    inside = torch.zeros(p_NU.shape[1], dtype=torch.bool)
    inside[list(numbers)] = True
    given_N, held_N = q_NU[:, inside].sum(1), p_NU[:, inside].sum(1)
    scale_N = (1 - given_N).clamp_min(0) / (1 - held_N).clamp_min(1e-12)
    return torch.where(inside, q_NU, p_NU * scale_N[:, None])


def js_divergence(p_NU: Tensor, q_NU: Tensor) -> Tensor:
    """The Jensen-Shannon divergence (N,) of two distributions, nat: 0 where equal, ln 2 where they share no token."""
    m_NU = (p_NU + q_NU) / 2
    ours, theirs = (torch.special.xlogy(x, x) - torch.special.xlogy(x, m_NU) for x in (p_NU, q_NU))
    divergence_N: Tensor = (ours + theirs).sum(1) / 2
    return divergence_N.clamp_min(0)


def rank_outputs(
    pair: Pair,
    changes: Sequence[Change],
    outputs: Outputs,
    f_NK: Tensor,
    settings: RankSettings,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[Ranked]:
    """Test changes at the output against random fine-tunes, on held-out text.

    A change is scored by the probability that its tokens gain, summed over scored tokens. A random fine-tune's score is the
    most that any group of as many tokens gains in it, chosen on the very text that it is scored on. Tokens that only one
    model has play no part in it: random fine-tunes have not learned any. `Ranked.effect` is in Jensen-Shannon nats.

    f_NK   strengths of the changes on the sample
    """
    if not changes:
        return []
    sample = outputs.sample
    rows = telling_rows(sample, f_NK, torch.zeros(len(f_NK), dtype=torch.bool), settings.null_tokens)
    few = outputs.only(rows)
    gain_NK, effect_NK = (
        torch.zeros(len(few.sample.row_N), len(changes)),
        torch.zeros(len(few.sample.row_N), len(changes)),
    )
    base_V = torch.zeros(pair.vocabulary, dtype=torch.float64)
    for where_N, p_NU, q_NU in few.parts():
        shared_NV = q_NU[:, few.shared]
        base_V += (shared_NV / shared_NV.sum(1, keepdim=True)).double().sum(0)
        gap_N = js_divergence(p_NU, q_NU)
        for k, change in enumerate(changes):
            group = group_of(change)
            gain_NK[where_N, k] = gained(p_NU, q_NU, group).sum(1)
            effect_NK[where_N, k] = gap_N - js_divergence(reweighed(p_NU, q_NU, group.numbers), q_NU)
    scored = few.sample.scored_N
    nulls = []
    for draw in range(settings.nulls):
        moved_V = _said(pair, pair.random_tuned(seed_of(seed, "null", draw)), few) - base_V
        nulls.append(torch.stack([_most(moved_V, group_of(change)) for change in changes]))
        if progress:
            progress(draw + 1, settings.nulls)
    null_RK = torch.stack(nulls).clamp_min(MOVED * int(scored.sum()))
    energy_K = gain_NK.double().sum(0).clamp_min(0)
    score_K, null_score_RK, p = max_t(energy_K, null_RK)
    best = tuple(null_score_RK.max(1).values.tolist())
    tokens_D, gain_KD, nats_KD = by_documents(
        few.sample.document_N[scored], torch.ones(int(scored.sum())), gain_NK[scored], effect_NK[scored]
    )
    ranked = []
    for k, change in enumerate(changes):
        scale = float(tokens_D.sum() / null_RK[:, k].mean())
        rate = bootstrap_ratio(gain_KD[k].numpy(), tokens_D.numpy(), seed=seed)
        on_N = f_NK[:, k] != 0
        ranked.append(
            Ranked(
                change,
                Interval(float(score_K[k]), rate.low * scale, rate.high * scale, rate.level),
                best,
                p[k],
                bootstrap_ratio(nats_KD[k].numpy(), tokens_D.numpy(), seed=seed),
                int(on_N.sum()),
                float(on_N.float().mean()),
                None,
            )
        )
    return sorted(ranked, key=lambda r: (-r.effect.value, r.change.id))


def _said(pair: Pair, model: LanguageModel, outputs: Outputs) -> Tensor:
    """The probability (V,) that a model gives to each compared token, summed over scored tokens."""
    said_V = torch.zeros(pair.vocabulary, dtype=torch.float64)
    sample = outputs.sample
    for batch in sample.batches(outputs.batch_tokens):
        chosen_BT = sample.scored_N[sample.places(batch).clamp_min(0)] & batch.mask_BT
        start = pair.common_start(batch.ids_BT, wanted_BT=batch.mask_BT)
        said = Said.at(model, batch.ids_BT, chosen_BT, pair.vocabulary, start)
        for at in range(0, said.shape[0], TILE):
            said_V += said.part(slice(at, at + TILE)).logp().double().exp().sum(0).cpu()
    return said_V


def _most(moved_V: Tensor, group: TokenGroup) -> Tensor:
    """The most probability that as many tokens as a group has gain, or lose if the group is lowered."""
    signed_V = moved_V * group.sign
    return signed_V.topk(min(len(group.numbers), len(signed_V))).values.clamp_min(0).sum()


def group_of(change: Change) -> TokenGroup:
    """The tokens that a change claims."""
    assert change.group is not None
    return change.group
