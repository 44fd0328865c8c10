"""Changes that raise or lower the logits of a group of tokens: found, ranked and tried on their own scale."""

from __future__ import annotations

import dataclasses
import json
from functools import cache
from pathlib import Path

import planted_pairs
import pytest
import tiny_models
import tiny_world
import torch
from command_line import cli
from planted_pairs import LAYER, SITE

from tunediff import dictionaries
from tunediff.changes.attributions import Shift
from tunediff.changes.calibrations import AS_A_PLACEBO, Calibration, NullPair
from tunediff.changes.finders.base import View
from tunediff.changes.finders.logit_gains import LogitGains
from tunediff.changes.gains import LEAST, Standing, chance, rank_gains, rises, standing
from tunediff.changes.outputs import Outputs
from tunediff.changes.rankings import Ranked, RankSettings
from tunediff.changes.trial_bench import spreads, trial_bench
from tunediff.changes.trials.base import VerifySettings
from tunediff.changes.trials.lift import Lift
from tunediff.dictionaries.schedule import FitSettings
from tunediff.harvests.harvest import Harvest
from tunediff.harvests.samples import Sample
from tunediff.models.pair import Pair
from tunediff.models.vocabulary import FLOOR
from tunediff.records.change import Change
from tunediff.records.diff import ChangeRecord
from tunediff.records.measure import STANDING, Measure
from tunediff.texts.tokens import Tokens

WORDS = tuple(range(200, 212))
"""Tokens that the text does not hold, and that the planted tune raises everywhere."""

RANK = RankSettings(nulls=19, null_tokens=400)


class Found:
    """A pair with its harvest, and what the finder and the ranking say of it."""

    def __init__(self, pair: Pair, tokens: Tokens, folder: Path):
        self.pair, self.folder = pair, folder
        self.harvest: Harvest = planted_pairs.harvested(pair, tokens, folder / "harvest")
        self.train, self.held = (
            Outputs(pair, Sample.take(self.harvest, tokens, split=split, limit=10**6, seed=0))
            for split in ("train", "held_out")
        )
        self.changes, self.ranked = cache(self.changes), cache(self.ranked)

    def changes(self) -> list[Change]:
        nothing = Shift.none(len(self.harvest.token_N))
        view = View(
            self.harvest, self.folder, 0, 8, dictionaries.spec("delta"), FitSettings(), lambda: nothing, self.pair
        )
        return LogitGains(tokens=len(WORDS)).find(dataclasses.replace(view, outputs=self.train)).changes

    def ranked(self) -> list[Ranked]:
        return rank_gains(self.pair, self.changes(), self.held, RANK, 0)


def lifted(network: torch.nn.Module, size: float, background: float = 0.05, seed: int = 5) -> torch.nn.Module:
    """A tuned copy that writes the rows of `WORDS` of the unembedding into the stream at every token, and some noise."""
    tuned = tiny_models.tuned_copy(network, background, seed=seed)
    rows_VD = network.get_output_embeddings().weight.detach()
    direction_D = torch.nn.functional.normalize((rows_VD[list(WORDS)] - rows_VD.mean(0)).mean(0), dim=0)
    mlp = planted_pairs.side(tuned, tiny_models.tokenizer(), "tuned").blocks[LAYER].mlp
    with torch.no_grad():
        mlp.down_proj.bias = torch.nn.Parameter(size * direction_D)
    return tuned


def biased() -> torch.nn.Module:
    """A tiny network whose MLPs have biases, so that a constant can be planted, and in which `WORDS` are spelled alike."""
    network, rng = tiny_models.module("llama"), torch.Generator().manual_seed(3)
    rows_VD = network.get_output_embeddings().weight.data
    common_D = torch.randn(rows_VD.shape[1], generator=rng)
    for word in WORDS:
        row_D = common_D + 0.3 * torch.randn(rows_VD.shape[1], generator=rng)
        rows_VD[word] = row_D / row_D.norm() * rows_VD.norm(dim=1).median()
    with torch.no_grad():
        for block in planted_pairs.side(network, tiny_models.tokenizer(), "base").blocks:
            block.mlp.down_proj.bias = torch.nn.Parameter(torch.zeros(block.mlp.down_proj.out_features))
    return network


@pytest.fixture(scope="module")
def tokens() -> Tokens:
    return planted_pairs.corpus_tokens()


@pytest.fixture(scope="module")
def found(tmp_path_factory, tokens) -> Found:
    base = biased()
    return Found(planted_pairs.pair_of(base, lifted(base, 2.0)), tokens, tmp_path_factory.mktemp("lifted"))


def test_rises_are_0_on_average_over_what_is_plausible():
    base = torch.randn(30, 50, generator=torch.Generator().manual_seed(0)) * 3
    tuned = base + torch.randn(30, 50, generator=torch.Generator().manual_seed(1))
    tuned[:, 7], base[:, 7] = -40.0, -60.0  # neither model would say it, however much it rises
    base[:, 9] = FLOOR  # base lacks it
    rise_NV, plausible_NV = rises(tuned, base)
    assert ((rise_NV * plausible_NV).sum(1) / plausible_NV.sum(1)).abs().max() < 1e-5
    assert not plausible_NV[:, [7, 9]].any() and plausible_NV.any(1).all()
    chance = 1 / 50
    likely = (tuned.softmax(1) > chance) | (base.softmax(1) > chance)
    likely[:, 9] = False
    assert torch.equal(plausible_NV, likely)


def test_a_standing_is_the_mean_gain_times_the_root_of_the_share_of_text():
    plausible = torch.zeros(400, 3, dtype=torch.bool)
    plausible[:100, 0], plausible[:, 1], plausible[: LEAST // 4, 2] = True, True, True
    found = Standing(3)
    for part in range(0, 400, 50):
        found.add(torch.full((50, 3), 2.0), plausible[part : part + 50])
    often = (LEAST / 4 * 2) / (400 * LEAST) ** 0.5  # as if it had been plausible that often
    assert found.score_V.tolist() == pytest.approx([2 * (100 / 400) ** 0.5, 2.0, often])


def test_tokens_that_are_raised_everywhere_are_one_change_that_stands_out_and_is_confirmed(found):
    score_V = standing(found.train).score_V
    assert set(score_V.topk(len(WORDS)).indices.tolist()) == set(WORDS)
    first = found.ranked()[0]
    group = first.change.group
    assert group.raised and set(group.numbers) == set(WORDS), group
    assert first.p == pytest.approx(1 / 20) and not chance(first, 0.05) and chance(first, 0.01)
    bench = trial_bench(
        found.pair, first.change, [], found.held.sample, spreads(found.harvest)[SITE], VerifySettings(draws=39), 0
    )
    outcome = Lift().run(bench, VerifySettings(draws=39))
    measures = {m.name: m for m in outcome.measures}
    assert outcome.speaks is True, outcome.reason
    assert measures["necessity"].value > 0.5 > measures["necessity"].control
    assert measures["sufficiency"].value > 0.5 > measures["sufficiency"].control
    assert measures["ceiling"].value > 0.9 and measures["gain of its tokens here"].value > 0
    quiet = dataclasses.replace(first.change, write_SMD=torch.zeros_like(first.change.write_SMD))
    bench = trial_bench(
        found.pair, quiet, [], found.held.sample, spreads(found.harvest)[SITE], VerifySettings(draws=39), 0
    )
    assert Lift().run(bench, VerifySettings(draws=39)).speaks is not True


def test_swapped_models_lower_the_tokens(found, tokens, tmp_path):
    pair = found.pair
    swapped = dataclasses.replace(
        pair,
        base=pair.tuned,
        tuned=pair.base,
        base_fingerprint=pair.tuned_fingerprint,
        tuned_fingerprint=pair.base_fingerprint,
    )
    first = Found(swapped, tokens, tmp_path).ranked()[0]
    assert not first.change.group.raised and set(first.change.group.numbers) == set(WORDS)


def test_equal_models_give_no_change(tokens, tmp_path):
    network = biased()
    assert not Found(planted_pairs.pair_of(network, network), tokens, tmp_path).changes()


@pytest.mark.slow
def test_noise_stands_out_no_more_often_than_the_level_says(tokens, tmp_path):
    base, stand, claimed = biased(), 0, 0
    for seed in range(20):
        pair = planted_pairs.pair_of(base, tiny_models.tuned_copy(base, 0.1, seed=seed))
        ranked = Found(pair, tokens, tmp_path / str(seed)).ranked()
        stand += any(r.p <= 0.05 for r in ranked)
        claimed += any(not chance(r, 0.05) for r in ranked)
    assert stand <= 2 and claimed == 0, (stand, claimed)


def test_a_standing_within_that_of_placebos_is_no_claim():
    nulls = [NullPair("placebo", True, 3.0, 0.2, 0.5), NullPair("placebo@1", True, 3.0, 0.2, 0.6)]
    nulls.append(NullPair("placebo@2", True, 3.0, 0.2, 0.7))
    calibration = Calibration("base", nulls, 0.05)
    assert calibration.standing > 0.7
    score = Measure("score", 9.0)

    def judged(stands: float) -> ChangeRecord:
        measures = [Measure(STANDING, stands)]
        some = ("resid.1", [], [], "", [], None, {}, [])
        record = ChangeRecord(1, "a", "f", [some[0]], 1.0, "confirmed", "said", score, measures, *some[1:])
        return calibration.judged(record)

    assert judged(calibration.standing * 1.1).decision == "confirmed"
    withdrawn = judged(calibration.standing * 0.9)
    assert withdrawn.decision == "undecided" and withdrawn.reason.startswith(AS_A_PLACEBO)
    assert withdrawn.measures[0].control == pytest.approx(calibration.standing)


@pytest.mark.slow
def test_a_whole_run_ranks_tokens_after_confirmed_changes_of_streams_and_takes_them_out(tmp_path):
    world = tiny_world.make(tmp_path)
    told = cli(*world.command("diff"))
    assert told.code == 0, told.err
    (run,) = (world.root / "runs").glob("*")
    changes = json.loads((run / "diff.json").read_text())["changes"]
    assert [c["rank"] for c in changes] == list(range(1, len(changes) + 1))
    tokens = [c for c in changes if c["finder"] == "logit_gains"]
    assert {c["id"] for c in tokens} >= {"logit_gains/raised-0", "logit_gains/lowered-0"}
    for c in tokens:
        assert c["sites"] != ["output"] and any(m["name"] == STANDING and m["value"] for m in c["measures"])
        assert bool(c["promoted"]) != bool(c["suppressed"])
    confirmed = [c["decision"] == "confirmed" for c in changes]
    assert confirmed == sorted(confirmed, reverse=True) and any(confirmed)
    first = next(n for n, c in enumerate(changes) if c["finder"] == "logit_gains")
    assert all(c["finder"] == "logit_gains" or c["decision"] != "confirmed" for c in changes[first:])
    undone = cli("revert", run, "--changes", "logit_gains/raised-0")
    assert undone.code == 0 and "share of KL" in undone.out, undone.err
