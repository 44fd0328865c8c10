"""Gains: which tokens' logits tuned raises or lowers, over all text, whether or not they are ever said.

At a token of text, a vocabulary entry is *plausible* where either model gives it more than chance, 1 / V. Its gain there is
logit(tuned) - logit(base), less the mean of that over all plausible entries. Implausible entries are left out: rare code
tokens and glitch tokens rise and fall together in any tune, and neither model would say them.

An entry's standing is the sum of its n gains divided by sqrt(n), over sqrt(N) for N tokens of text. That is its mean gain
where it is plausible, times the square root of the share of text where it is. So a word that is raised much in few places
and one that is raised a little everywhere are on one scale, as sums of n independent gains would be.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tunediff.changes.outputs import Outputs, group_of
from tunediff.changes.rankings import Ranked, RankSettings, halves, max_t, summed, telling_rows
from tunediff.core.chance import seed_of
from tunediff.models.divergences import TILE, Said
from tunediff.models.network import LanguageModel
from tunediff.models.pair import Pair
from tunediff.models.vocabulary import FLOOR
from tunediff.records.change import Change, TokenGroup
from tunediff.texts.tokens import Tokens

BATCH_TOKENS = 2048
LEAST = 20
"""Fewest tokens of text on which an entry counts as plausible; an entry that is less often, counts as this often."""


def rises(tuned_NV: Tensor, base_NV: Tensor) -> tuple[Tensor, Tensor]:
    """How much tuned raises every entry's logit at each token (N, V), and where it is plausible, as the module says.

    Entries that only one model has are plausible nowhere. Rises are 0 on average over the plausible ones.
    """
    chance = -math.log(tuned_NV.shape[1])
    plausible_NV = torch.maximum(*(x - x.logsumexp(1, keepdim=True) for x in (tuned_NV, base_NV))) > chance
    plausible_NV &= torch.minimum(tuned_NV, base_NV) > FLOOR / 2
    rise_NV = tuned_NV - base_NV
    mean_N = (rise_NV * plausible_NV).sum(1) / plausible_NV.sum(1).clamp_min(1)
    return rise_NV - mean_N[:, None], plausible_NV


@dataclass
class Standing:
    """Running sums of gains over text, O(V).

    gain_V    each entry's gains, summed over the tokens where it is plausible
    count_V   the number of these tokens
    tokens    tokens of text that were read
    """

    vocabulary: int
    tokens: int = 0
    gain_V: Tensor = field(init=False)
    count_V: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.gain_V = torch.zeros(self.vocabulary, dtype=torch.float64)
        self.count_V = torch.zeros(self.vocabulary, dtype=torch.float64)

    def add(self, rise_NV: Tensor, plausible_NV: Tensor) -> None:
        """Add tokens of text."""
        self.gain_V += (rise_NV * plausible_NV).double().sum(0)
        self.count_V += plausible_NV.sum(0)
        self.tokens += len(rise_NV)

    @property
    def weight_V(self) -> Tensor:
        """What a gain of each entry counts."""
        return 1 / (max(self.tokens, 1) * self.count_V.clamp_min(LEAST)).sqrt()

    @property
    def score_V(self) -> Tensor:
        """Each entry's standing, nat; below 0 where tuned lowers it."""
        return self.gain_V * self.weight_V


def standing(outputs: Outputs) -> Standing:
    """The gains of all entries on a sample."""
    found = Standing(outputs.pair.vocabulary)
    for _, tuned_NV, base_NV in outputs.logits():
        found.add(*rises(tuned_NV, base_NV))
    return found


def raised_words(pair: Pair, tokens: Tokens, count: int = 12) -> list[str]:
    """Words whose standing is highest in tuned's favor over the answers of some rows, highest first.

    Only tokens count that begin a word and have at least three letters.
    """
    found, V = Standing(pair.vocabulary), pair.vocabulary
    for batch in tokens.batches(BATCH_TOKENS):
        before_B = torch.tensor([tokens.prompt_R[row] for row in batch.rows_B.tolist()])
        wanted_BT = batch.mask_BT & (torch.arange(batch.ids_BT.shape[1]) >= before_B[:, None] - 1)
        states = pair.both_states(batch.ids_BT, wanted_BT=wanted_BT)[:2]
        base_ND, tuned_ND = (state_BTD[wanted_BT] for state_BTD in states)
        for base, tuned in zip(base_ND.split(TILE), tuned_ND.split(TILE)):
            sides = ((pair.tuned, tuned), (pair.base, base))
            found.add(*rises(*(m.logits(s.contiguous())[:, :V].float().cpu() for m, s in sides)))
    score_V, words = found.score_V, list[str]()
    for number in score_V.argsort(descending=True).tolist():
        if score_V[number] <= 0 or len(words) == count:
            break
        name = pair.vocabularies.name(1, number)
        if name.startswith(" ") and len(name) > 3 and name[1:].isalpha():
            words.append(name.strip())
    return words


def rank_gains(
    pair: Pair,
    changes: Sequence[Change],
    outputs: Outputs,
    settings: RankSettings,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[Ranked]:
    """Test changes that raise or lower a group of tokens against random fine-tunes, on held-out text.

    A change is scored by the mean standing of its tokens. A random fine-tune's score is the highest that any group of as many
    tokens has in it, on the very text that it is scored on. `Ranked.effect` is the mean standing itself, nat.
    """
    if not changes:
        return []
    sample = outputs.sample
    f_NK = torch.stack([sample.strength(c) for c in changes], 1)
    few = outputs.only(
        telling_rows(sample, f_NK, halves(sample), settings.null_tokens // 2)
    )  # every entry moves at every token
    own = standing(few)
    groups = [group_of(change) for change in changes]
    score_NK, on_NK = (torch.zeros(len(few.sample.row_N), len(changes)) for _ in range(2))
    for where_N, tuned_NV, base_NV in few.logits():
        rise_NV, plausible_NV = rises(tuned_NV, base_NV)
        for k, group in enumerate(groups):
            numbers = list(group.numbers)
            mine = rise_NV[:, numbers] * plausible_NV[:, numbers] * group.sign
            score_NK[where_N, k] = (mine * own.weight_V[numbers]).mean(1).float()
            on_NK[where_N, k] = plausible_NV[:, numbers].any(1).float()
    nulls = []
    for draw in range(settings.nulls):
        moved = _standing_of(pair.random_tuned(seed_of(seed, "null", draw)), few).score_V
        nulls.append(torch.stack([_highest(moved, group) for group in groups]))
        if progress:
            progress(draw + 1, settings.nulls)
    score_K = score_NK.double().sum(0).clamp_min(0)
    relative_K, null_RK, p = max_t(score_K, torch.stack(nulls))
    scale_K = (relative_K / score_K).nan_to_num()
    scored = few.sample.scored_N
    document_N = few.sample.document_N[scored]
    best = tuple(null_RK.max(1).values.tolist())
    ranked = [
        Ranked(
            change,
            summed(score_NK[scored][:, k] * scale_K[k], document_N, seed),
            best,
            p[k],
            summed(score_NK[scored][:, k], document_N, seed),
            int(on_NK[:, k].sum()),
            float(on_NK[scored][:, k].mean()),
            None,
        )
        for k, change in enumerate(changes)
    ]
    return sorted(ranked, key=lambda r: (-r.score.value, r.change.id))


def chance(ranked: Ranked, level: float) -> tuple[str, str] | None:
    """Why the standing of a change may be chance, as a decision and its reason; None where it stands out.

    The interval of its score has to be above the best group of every random fine-tune. A p at the level alone would let
    through as many nulls as the test of directions does, on top of these.
    """
    if ranked.p > level:
        return "refuted", f"random tunes raise tokens as much (p = {ranked.p:.2g})"
    if ranked.score.low <= max(ranked.null):
        return "undecided", "the interval of its standing reaches those of random tunes"
    return None


def _standing_of(model: LanguageModel, outputs: Outputs) -> Standing:
    """The gains of all entries in another tuned model."""
    pair, sample = outputs.pair, outputs.sample
    found, base_ND = Standing(pair.vocabulary), outputs.states[1]
    at = 0
    for batch in sample.batches(outputs.batch_tokens):
        chosen_BT = sample.scored_N[sample.places(batch).clamp_min(0)] & batch.mask_BT
        if not chosen_BT.any():
            continue
        start = pair.common_start(batch.ids_BT, wanted_BT=batch.mask_BT)
        said = Said.at(model, batch.ids_BT, chosen_BT, pair.vocabulary, start)
        base = Said(pair.base, base_ND[at : at + said.shape[0]], pair.vocabulary)
        at += said.shape[0]
        for part in range(0, said.shape[0], TILE):
            rows = slice(part, part + TILE)
            found.add(*rises(*(s.part(rows).logits().float().cpu() for s in (said, base))))
    return found


def _highest(score_V: Tensor, group: TokenGroup) -> Tensor:
    """The highest mean standing of as many entries as a group has."""
    signed_V = score_V * group.sign
    return signed_V.topk(min(len(group.numbers), len(signed_V))).values.mean().clamp_min(0)
