"""Noise in whatever kind of parameters is no finding; what is planted there is one; what random tunes leave out is said."""

from __future__ import annotations

import null_pairs
import planted_pairs
import pytest
import tiny_models
import torch

from tunediff.changes.rankings import Ranking, RankSettings
from tunediff.models.pair import Pair
from tunediff.records.diff import WeightsCard

SEEDS = 2
"""A table of twenty is made by ``tools/null_parameters.py``."""


@pytest.fixture(scope="module")
def tokens():
    return null_pairs.text()


@pytest.mark.slow
@pytest.mark.parametrize("kind", null_pairs.KINDS)
def test_noise_stands_out_no_more_often_than_the_level_says(kind, tokens, tmp_path):
    standing = 0
    for seed in range(SEEDS):
        base = null_pairs.network(null_pairs.KINDS[kind][0], seed)
        pair = planted_pairs.pair_of(base, null_pairs.noisy(base, kind, seed))
        ranked = null_pairs.ranking(pair, tokens, tmp_path / str(seed))
        assert ranked.ranked and not ranked.refusal
        assert max(r.score.value for r in ranked.ranked) < 10, "in the null's own units, noise is of the order of 1"
        standing += null_pairs.standing(ranked) > 0
    assert standing <= 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["experts", "embeddings"])
def test_a_planted_change_stands_out(kind, tokens, tmp_path):
    base = null_pairs.network(null_pairs.KINDS[kind][0])
    tuned = null_pairs.planted_experts(base, tokens) if kind == "experts" else null_pairs.planted_embedding(base)
    ranked = null_pairs.ranking(planted_pairs.pair_of(base, tuned), tokens, tmp_path / "harvest")
    assert null_pairs.standing(ranked) > 0


# What differs, and what random tunes leave out


@pytest.mark.parametrize("kind", null_pairs.KINDS)
def test_a_random_tune_changes_what_the_tune_changed_in_its_own_norm(kind):
    base = null_pairs.network(null_pairs.KINDS[kind][0])
    pair = planted_pairs.pair_of(base, null_pairs.noisy(base, kind, 0))
    deltas = pair.deltas()
    changed = {n for n, p in pair.tuned.module.named_parameters() if not torch.equal(p, base.get_parameter(n))}
    names = {id(p): n for n, p in pair.tuned.module.named_parameters()}
    assert {names[id(d.parameter)] for d in deltas} == changed
    for delta in deltas:
        for values in (delta.random(3), delta.permuted(3)):
            ((parameter, value),) = values.items()
            now, then = parameter.data.double() - delta.base.double(), value.double() - delta.base.double()
            assert value.shape == parameter.shape
            assert not torch.allclose(now, then, atol=1e-6) or now.numel() < 4
            assert float(then.norm()) == pytest.approx(float(now.norm()), rel=1e-3)
        if delta.kind == "experts":  # of each expert, not of all together
            then = delta.random(3)[delta.parameter].double() - delta.base.double()
            now = delta.parameter.data.double() - delta.base.double()
            torch.testing.assert_close(then.flatten(1).norm(dim=1), now.flatten(1).norm(dim=1), rtol=1e-3, atol=1e-6)
        if delta.kind == "embeddings":  # of each row, so that tokens whose rows stayed keep them
            then = delta.random(3)[delta.parameter].double() - delta.base.double()
            now = delta.parameter.data.double() - delta.base.double()
            torch.testing.assert_close(then.norm(dim=1), now.norm(dim=1), rtol=1e-3, atol=1e-6)
    assert {card.kind for card in pair.weights()} == {d.kind for d in deltas}
    assert sum(card.share for card in pair.weights()) == pytest.approx(1)


def test_ranking_refuses_where_random_tunes_leave_out_more_than_a_tenth():
    cards = [
        WeightsCard("linear maps", 9, 0.85, True),
        WeightsCard("parameters that only one model has", 1, 0.15, False),
    ]
    refusal = RankSettings().refusal(cards)
    assert "15%" in refusal and "only one model" in refusal and "--set rank.covered=0" in refusal
    assert not RankSettings(covered=0).refusal(cards)
    assert not RankSettings().refusal([WeightsCard("linear maps", 9, 0.95, True), WeightsCard("x", 1, 0.05, False)])


def test_a_refusal_is_kept_with_the_ranking(tmp_path):
    ranking = Ranking([], [WeightsCard("experts", 3, 1.0, False)], "random tunes leave it out")
    ranking.save(tmp_path)
    again = Ranking.load(tmp_path, {})
    assert (again.weights, again.refusal) == (ranking.weights, ranking.refusal)
    (tmp_path / "weights.json").unlink()
    assert Ranking.load(tmp_path, {}).refusal == ""  # of 0.1.0


def test_models_that_differ_in_no_weight_differ_elsewhere():
    network = tiny_models.module("llama")
    pair = planted_pairs.pair_of(network, network)
    assert pair.weights() == []
    other = Pair(pair.base, pair.tuned, False, 300, "one", "other")
    assert [card.covered for card in other.weights()] == [False] and RankSettings().refusal(other.weights())


def test_biases_that_only_one_model_has_are_left_out():
    from transformers import AutoModelForCausalLM

    network = tiny_models.module("llama")
    config = network.config.__class__(**{**network.config.to_dict(), "attention_bias": True})
    tuned = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    tuned.load_state_dict(network.state_dict(), strict=False)
    assert [card.parameters for card in planted_pairs.pair_of(network, tuned).weights()] == [0], "all of them are zeros"
    tuned.model.layers[0].self_attn.q_proj.bias.data.fill_(0.1)
    (card,) = planted_pairs.pair_of(network, tuned).weights()
    assert (card.parameters, card.share, card.covered) == (1, 1.0, False)
