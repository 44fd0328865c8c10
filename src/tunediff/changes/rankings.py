"""Rankings: which changes stand out from random fine-tuning, and how much of the output shift each change makes.

Score. On held-out text, a change is scored by the energy of the difference between both models that its strength
predicts. The score is compared with random fine-tunes of the same norms: the most energy they have along any one
direction on the same tokens. The p-value accounts for the number of candidates.

Effect. On training text, the change alone is removed from the tuned model's stream at its last site, and the blocks
above run again. The effect is the part of KL(tuned || base) that is then gone. This is an intervention; no gradient is
used.

Refusal. Random fine-tunes change every parameter that differs, each in its own norm. Where they leave out more of the
difference than `RankSettings.covered` allows, scores say nothing about chance, and no change may be confirmed.

Order. Changes that stand out come first. Each next change explains most of the KL that the changes before it leave. In
every document, effects add up to that document's KL at most. Effects and order come from training text, so that trials
on held-out text test changes that were not chosen on it. Changes that do not stand out follow by score.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from tunediff.changes.attributions import removed
from tunediff.core.artifacts import LATER, read_json, write_json
from tunediff.core.axes import BASE, TUNED
from tunediff.core.chance import Interval, bootstrap_mean, bootstrap_ratio, seed_of
from tunediff.core.errors import NumericsError, within
from tunediff.core.typed import typed
from tunediff.harvests.samples import Sample
from tunediff.models.network import LanguageModel
from tunediff.models.pair import Pair
from tunediff.models.passes import Start
from tunediff.records.change import Change
from tunediff.records.diff import WeightsCard, load_depth
from tunediff.records.profile import Profile
from tunediff.records.scan import depth_profile
from tunediff.records.site import Site
from tunediff.texts.tokens import Batch


@dataclass(frozen=True)
class RankSettings:
    """How changes are tested against random fine-tunes and ordered."""

    nulls: int = 19
    """Number of random fine-tunes; the smallest p-value is 1 / (nulls + 1), so 19 allow a claim at 5 % and 99 at 1 %.
    """
    null_tokens: int = 1000
    """Fewest held-out tokens that each random fine-tune runs on; fewer tokens make rare changes untestable."""
    effect_tokens: int = 2000
    """Fewest training tokens for measuring effects, from the rows with the candidates' largest strengths.

    More tokens improve the order of changes, at proportional cost.
    """
    level: float = 0.05
    """False-positive rate at which a change counts as standing out (0..1)."""
    batch_tokens: int = 1200
    """Number of tokens in one forward pass."""
    covered: float = field(default=0.9, metadata=LATER)
    """Smallest share of the difference of weights that random fine-tunes must cover for any change to be confirmed (0..1).

    With 0, changes are confirmed whatever random fine-tunes leave out."""

    def __post_init__(self) -> None:
        within("rank", self, nulls=2, null_tokens=1, effect_tokens=1, level=(0, 1), batch_tokens=1, covered=(0, 1))

    def refusal(self, weights: Sequence[WeightsCard]) -> str:
        """Why no change may be confirmed, in one sentence; empty where random fine-tunes cover enough of the difference."""
        out = [card for card in weights if not card.covered]
        share = sum(card.share for card in out)
        if 1 - share >= self.covered:
            return ""
        left = "; ".join(card.kind for card in out)
        return (
            f"random tunes leave out {share:.0%} of the difference ({left}), so what stands out from them may be chance "
            "(--set rank.covered=0 confirms it all the same)"
        )


@dataclass(frozen=True)
class Ranked:
    """The ranking's result for one change.

    score     energy of the difference that the change's strength predicts (`energy_along`), divided by the mean over
              random fine-tunes of their most energy along any one direction (`most_energy`). Chance reaches about 1.
              The interval is over documents, with the random fine-tunes fixed.
    null      for each random fine-tune, the largest score over all candidates
    p         chance that the best of all candidates scores as much under a random fine-tune: max-T, which accounts for
              the number of candidates (Westfall & Young 1993)
    effect    KL(tuned || base), nat a token, that goes when the change is removed from tuned; with an interval over
              documents, on training text with the candidates' largest strengths
    firings, share_of_tokens   held-out tokens on which the change is on: their number, and their share of all
    depth     what the change explains of the difference at each scanned site (`depth_profile`); None without a scan
    """

    change: Change
    score: Interval
    null: tuple[float, ...]
    p: float
    effect: Interval
    firings: int
    share_of_tokens: float
    depth: Profile | None


@dataclass(frozen=True, eq=False)
class Ranking:
    """Ranked changes: first those that stand out, in the order of `cover`, then the others by score.

    weights   in which parameters the models differ
    refusal   why no change may be confirmed, empty where nothing stands against it
    """

    ranked: list[Ranked]
    weights: list[WeightsCard] = field(default_factory=list)
    refusal: str = ""

    @property
    def note(self) -> str:
        """What was ranked, in one line."""
        said = f"{len(self.ranked)} candidates against {len(self.ranked[0].null) if self.ranked else 0} random tunes"
        return f"{said}; {self.refusal}" if self.refusal else said

    def save(self, folder: Path) -> list[str]:
        """Write ``ranking.json``, with changes by their ids, and ``weights.json``; return their names, for a manifest."""
        write_json(folder / "ranking.json", [{**vars(r), "change": r.change.id} for r in self.ranked])
        write_json(folder / "weights.json", {"weights": self.weights, "refusal": self.refusal})
        return ["ranking.json", "weights.json"]

    @classmethod
    def load(cls, folder: Path, changes: Mapping[str, Change]) -> Ranking:
        """Read a ranking that `save` wrote, of this or an older form; `changes` holds the ranked changes by id."""
        ranked = []
        for record in read_json(folder / "ranking.json"):
            intervals = {name: typed(Interval, record[name], name) for name in ("score", "effect")}
            change, depth = changes[record["change"]], load_depth(record["depth"], record["change"])
            known = {"change": change, "null": tuple(record["null"]), "depth": depth}
            ranked.append(Ranked(**{**record, **known, **intervals}))
        if not (folder / "weights.json").is_file():  # of 0.1.0
            return cls(ranked)
        rest = read_json(folder / "weights.json")
        return cls(ranked, typed(list[WeightsCard], rest["weights"], "weights.json"), rest["refusal"])


def streams_of(model: LanguageModel, sample: Sample, runs: Sequence[tuple[Batch, Start | None]]) -> Tensor:
    """Streams (N, S, D) of another tuned model on a sample's tokens; `runs` holds the batches and where each may start."""
    return _flat(
        sample, ((batch, model.streams(batch.ids_BT, sample.sites, start, batch.mask_BT)) for batch, start in runs)
    )


def _flat(sample: Sample, found: Iterable[tuple[Batch, Tensor]]) -> Tensor:
    """Results for each of a sample's batches (B, T, ...) as flat tokens in the sample's order, in float32."""
    parts: dict[int, Tensor] = {}
    for batch, streams in found:
        for row, stream_TX in zip(batch.rows_B.tolist(), streams.float().cpu()):
            parts[row] = stream_TX[: len(sample.tokens.rows[row])]
    return torch.cat([parts[row] for row in sample.rows])


def energy_along(strength_NK: Tensor, delta_NSD: Tensor, half_N: Tensor, constant_K: Tensor) -> Tensor:
    """For each change, the energy of the difference that its strength predicts on documents not used for the fit.

    The write direction is fitted again by least squares on one half of the documents and scored on the other; then the
    halves swap. Chance gives 0 on average, or slightly less, because fitted noise costs energy on the other half.
    Constant changes are scored on the constant offset, all others on the difference without it. Returns each token's
    part (N, K), float64.
    """
    N, S, D = delta_NSD.shape
    delta_ND = delta_NSD.reshape(N, S * D).double()
    f_NK = strength_NK.double()
    out = torch.zeros_like(f_NK)
    for fit_half in (False, True):
        fitted, scored = half_N == fit_half, half_N != fit_half
        if not fitted.any() or not scored.any():
            continue  # a change that is on in one half only cannot be cross-validated
        mean_D = delta_ND[fitted].mean(0)
        for constant in (True, False):
            chosen = (constant_K == constant).nonzero()[:, 0]
            if not len(chosen):
                continue
            f_fit, f_score = f_NK[fitted][:, chosen], f_NK[scored][:, chosen]
            d_fit, d_score = delta_ND[fitted], delta_ND[scored]
            if not constant:
                mean_f = f_fit.mean(0)
                f_fit, f_score, d_fit, d_score = f_fit - mean_f, f_score - mean_f, d_fit - mean_D, d_score - mean_D
            write_KD = (f_fit.T @ d_fit) / f_fit.pow(2).sum(0).clamp_min(1e-30)[:, None]
            part = 2 * f_score * (d_score @ write_KD.T) - f_score.pow(2) * write_KD.pow(2).sum(1)
            out[scored.nonzero()[:, 0, None], chosen] = part
    return out


def most_energy(delta_NSD: Tensor, on_NK: Tensor, constant_K: Tensor, rounds: int = 12) -> Tensor:
    """For each change, the most energy of a difference along any one direction, on the tokens where the change is on.

    The best direction is found for every candidate on the very tokens that are scored. This favors random fine-tunes,
    and must: a direction found in one fine-tuned model always fits that model better than another. Constant changes are
    scored on the constant offset, all others on the difference without it. Returns (K,), float64.
    """
    N, S, D = delta_NSD.shape
    delta_ND = delta_NSD.reshape(N, S * D)
    mean_D = delta_ND.mean(0)
    centered_ND = delta_ND - mean_D
    out = []
    for k in range(on_NK.shape[1]):
        if constant_K[k]:
            out.append(float(mean_D.double().square().sum()) * N)
            continue
        x = centered_ND[on_NK[:, k]]
        if not len(x) or not x.any():
            out.append(0.0)
            continue
        v = x[x.square().sum(1).argmax()]
        for _ in range(rounds):  # power iteration
            v = torch.nn.functional.normalize(x.T @ (x @ v), dim=0)
        out.append(float((x @ v).double().square().sum()))
    return torch.tensor(out, dtype=torch.float64)


def max_t(energy_K: Tensor, null_RK: Tensor) -> tuple[Tensor, Tensor, list[float]]:
    """Scores (K,), the random fine-tunes' scores (R, K), and max-T adjusted p-values.

    A score is an energy divided by the mean energy of the random fine-tunes for the same change. A random fine-tune's
    own energy is divided by the mean of the *other* ones. Changes of any size and rarity then share one scale.
    """
    total_K, draws, floor = null_RK.sum(0), len(null_RK), 1e-30
    if not bool(torch.isfinite(energy_K).all() and torch.isfinite(null_RK).all()):
        raise NumericsError("an energy is not finite, so no change can be ranked", remedy="--set pair.dtype=float32")
    score_K = energy_K / (total_K / draws).clamp_min(floor)
    null_score_RK = null_RK / ((total_K - null_RK) / max(draws - 1, 1)).clamp_min(floor)
    best_R = null_score_RK.max(1).values
    p = [(1 + int((best_R >= score).sum())) / (1 + draws) for score in score_K]
    return score_K, null_score_RK, p


def rank(
    pair: Pair,
    changes: Sequence[Change],
    sample: Sample,
    seen: Sample,
    settings: RankSettings,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
    depths: Sequence[Site] = (),
) -> Ranking:
    """Test every change against random fine-tunes, and order the changes as the module's docstring describes.

    sample   held-out text, on which scores are measured
    seen     training text, on which effects are measured
    depths   sites at which `Ranked.depth` is measured
    """
    weights = pair.weights()
    refusal = settings.refusal(weights)
    if not changes:
        return Ranking([], weights, refusal)
    f_NK = torch.stack([sample.strength(c) for c in changes], 1)
    half_N = halves(sample)
    constant_K = torch.tensor([bool((c.rows_SMD == 0).all()) for c in changes])

    rows = telling_rows(sample, f_NK, half_N, settings.null_tokens)
    few = sample.only(rows)
    here = torch.isin(sample.row_N, torch.tensor(rows))
    keep = few.ordinary_N
    few_f_NK, base_NSD = f_NK[here][keep], few.streams_NSMD[:, :, BASE]
    delta_NSD = (few.streams_NSMD[:, :, TUNED] - base_NSD)[keep]
    energy_NK = energy_along(few_f_NK, delta_NSD, half_N[here][keep], constant_K)
    energy_K = energy_NK.sum(0)
    on_NK = few_f_NK != 0
    nulls = []
    runs = [
        (batch, pair.common_start(batch.ids_BT, sample.sites, batch.mask_BT))
        for batch in few.batches(settings.batch_tokens)
    ]
    for draw in range(settings.nulls):
        other = streams_of(pair.random_tuned(seed_of(seed, "null", draw)), few, runs)
        nulls.append(most_energy((other - base_NSD)[keep], on_NK, constant_K))
        if progress:
            progress(draw + 1, settings.nulls)
    score_K, null_RK, p = max_t(energy_K, torch.stack(nulls))
    scale_K = (score_K / energy_K).nan_to_num()
    document_N = few.document_N[keep]

    both = (
        (batch, pair.both_streams(batch.ids_BT, depths, batch.mask_BT)) for batch in few.batches(settings.batch_tokens)
    )
    depth = None
    if depths:
        both_NSMD = _flat(few, both)[keep]
        share_SK = [
            _share_along(few_f_NK, both_NSMD[:, s : s + 1], half_N[here][keep], constant_K).tolist()
            for s in range(len(depths))
        ]
        depth = depth_profile([c.id for c in changes], list(map(str, depths)), list(zip(*share_SK)))
    seen_f_NK = torch.stack([seen.strength(c) for c in changes], 1)
    rows = telling_rows(seen, seen_f_NK, halves(seen), settings.effect_tokens)
    here = torch.isin(seen.row_N, torch.tensor(rows))
    seen = seen.only(rows)
    kl_N, less_NK = removed(pair, changes, seen_f_NK[here], seen, settings.batch_tokens)
    tokens_D, gap_D, nats_KD = by_documents(seen.document_N, torch.ones(len(kl_N)), kl_N, less_NK)
    best = tuple(null_RK.max(1).values.tolist())
    ranked = [
        Ranked(
            c,
            summed(energy_NK[:, k] * scale_K[k], document_N, seed),
            best,
            p[k],
            bootstrap_ratio(nats_KD[k].numpy(), tokens_D.numpy(), seed=seed),
            int((f_NK[:, k] != 0).sum()),
            float((f_NK[:, k] != 0).float().mean()),
            depth and depth.only([c.id]),
        )
        for k, c in enumerate(changes)
    ]
    claim = max(settings.level, 1 / (1 + settings.nulls))
    standing = [k for k in range(len(changes)) if ranked[k].p <= claim]
    order = cover(nats_KD, gap_D, standing)
    order += sorted(set(range(len(changes))) - set(standing), key=lambda k: (-ranked[k].score.value, changes[k].id))
    return Ranking([ranked[k] for k in order], weights, refusal)


def _share_along(f_NK: Tensor, both_NSMD: Tensor, half_N: Tensor, constant_K: Tensor) -> Tensor:
    """Share (K,) of a difference's variance that each change's strength predicts; for constant changes, of its energy."""
    delta_NSD = (both_NSMD[:, :, TUNED] - both_NSMD[:, :, BASE]).double()
    whole, offset = float(delta_NSD.square().sum()), float(delta_NSD.mean(0).square().sum()) * len(delta_NSD)
    total_K = torch.where(constant_K, whole, whole - offset).clamp_min(1e-30)
    return energy_along(f_NK, delta_NSD, half_N, constant_K).sum(0) / total_K


def by_documents(document_N: Tensor, *values: Tensor) -> list[Tensor]:
    """Sums of values (N,) or (N, K) over each document's tokens: (D,) or (K, D), float64."""
    documents, number_N = document_N.unique(return_inverse=True)
    sums = (
        torch.zeros(len(documents), *v.shape[1:], dtype=torch.float64).index_add_(0, number_N, v.double())
        for v in values
    )
    return [total.movedim(0, -1) for total in sums]


def summed(value_N: Tensor, document_N: Tensor, seed: int) -> Interval:
    """The sum of a value over tokens, with its interval over documents."""
    (sums,) = by_documents(document_N, value_N)
    mean = bootstrap_mean(sums.numpy(), seed=seed)
    return Interval(mean.value * len(sums), mean.low * len(sums), mean.high * len(sums), mean.level)


def telling_rows(sample: Sample, f_NK: Tensor, half_N: Tensor, limit: int) -> list[int]:
    """Rows with the candidates' largest strengths, candidates and halves taking turns, until `limit` tokens are
    reached.
    """
    rows, row_N = sample.row_N.unique(return_inverse=True)
    length_R = torch.bincount(row_N)
    half_R = torch.zeros(len(rows), dtype=torch.bool)
    half_R[row_N] = half_N
    energy_RK = torch.zeros(len(rows), f_NK.shape[1]).index_add_(0, row_N, f_NK.square())
    orders = [
        [r for r in torch.argsort(energy_RK[:, k], descending=True, stable=True).tolist() if half_R[r] == half]
        for k in range(f_NK.shape[1])
        for half in (False, True)
    ]
    chosen: dict[int, None] = {}
    count = 0
    for turn in range(len(rows)):
        for order in orders:
            if turn < len(order) and order[turn] not in chosen:
                if count >= limit:
                    return sorted(rows[list(chosen)].tolist())
                chosen[order[turn]] = None
                count += int(length_R[order[turn]])
    return sorted(rows[list(chosen)].tolist())


def cover(nats_KD: Tensor, gap_D: Tensor, among: Sequence[int]) -> list[int]:
    """Order changes greedily: each next change explains most of the output shift that the earlier ones leave
    unexplained.

    nats_KD   effect of each change in each document
    gap_D     the whole KL(tuned || base) of each document

    A document counts up to its gap. Changes with effects on the same documents therefore do not displace one with an
    effect on others.
    """
    left, order = list(among), []
    covered_D = torch.zeros_like(gap_D)
    while left:
        gains = torch.stack([torch.minimum(gap_D, covered_D + nats_KD[k]) - covered_D for k in left]).sum(1)
        k = left.pop(int(gains.argmax()))
        order.append(k)
        covered_D = torch.minimum(gap_D, covered_D + nats_KD[k]).clamp_min(0)
    return order


def halves(sample: Sample) -> Tensor:
    """The half of the documents (N,) that each token belongs to; both answers to one prompt are in the same half."""
    groups = [sample.tokens.documents[d].group or sample.tokens.documents[d].id for d in sample.document_N.tolist()]
    number = {group: i for i, group in enumerate(sorted(set(groups)))}
    return torch.tensor([number[g] % 2 for g in groups]).bool()
