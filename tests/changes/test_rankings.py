"""Rankings: p-values keep what they promise, energy along a change is unbiased, samples are whole rows."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import planted_pairs
import pytest
import torch

from tunediff.changes import rankings
from tunediff.changes.attributions import removed
from tunediff.changes.finders.mean_difference import MeanDifference
from tunediff.changes.rankings import Ranking, cover, max_t, streams_of
from tunediff.core.axes import TUNED
from tunediff.core.errors import NumericsError
from tunediff.harvests.samples import Sample
from tunediff.models.divergences import kl_divergence
from tunediff.models.passes import Start

DRAWS, CHANGES, REPETITIONS = 19, 6, 200


def heavy(generator: torch.Generator, *shape: int) -> torch.Tensor:
    """Energies as they come: on very different scales, skewed, some below 0, correlated within a draw."""
    scale = torch.logspace(-3, 3, shape[-1], dtype=torch.float64)
    noise = torch.randn(*shape, 3, generator=generator, dtype=torch.float64)
    shared = torch.randn(*shape[:-1], 1, 3, generator=generator, dtype=torch.float64)
    return scale * ((noise + 0.5 * shared).pow(2).sum(-1) - 2)


def test_max_t_is_uniform_under_exchangeable_draws():
    rng = torch.Generator().manual_seed(0)
    best = []
    for _ in range(REPETITIONS):
        _, _, p = max_t(heavy(rng, CHANGES), heavy(rng, DRAWS, CHANGES))
        best.append(min(p))
    best = np.array(best)
    steps = np.arange(1, DRAWS + 2) / (DRAWS + 1)
    assert set(np.round(best * (DRAWS + 1)).astype(int)) <= set(range(1, DRAWS + 2))
    # Never more than the level promises, within three standard errors at each step; and not far below it.
    rate = np.array([(best <= s + 1e-9).mean() for s in steps])
    error = np.sqrt(steps * (1 - steps) / REPETITIONS)
    assert (rate <= steps + 3 * error + 1e-9).all()
    assert abs(best.mean() - steps.mean()) < 4 * steps.std() / np.sqrt(REPETITIONS)


def test_max_t_sees_one_that_stands_out_and_the_order_of_changes_is_nothing():
    rng = torch.Generator().manual_seed(1)
    null, energy = heavy(rng, DRAWS, CHANGES).abs(), heavy(rng, CHANGES)
    energy[2] = 50 * null[:, 2].abs().max()
    score, null_score, p = max_t(energy, null)
    assert p[2] == 1 / (DRAWS + 1) and null_score.shape == (DRAWS, CHANGES)
    turned = max_t(energy.flip(0), null.flip(1))
    torch.testing.assert_close(turned[0].flip(0), score)
    assert turned[2][::-1] == p
    scaled = max_t(energy * 7, null * 7)
    torch.testing.assert_close(scaled[0], score)


def test_max_t_of_nothing_is_one():
    score, _, p = max_t(torch.zeros(3), torch.zeros(DRAWS, 3))
    assert p == [1.0] * 3 and score.tolist() == [0.0] * 3


def energy_along(*given) -> torch.Tensor:
    """The energy over all tokens, (K,)."""
    return rankings.energy_along(*given).sum(0)


def case(seed: int, n: int = 400, width: int = 12, changes: int = 4):
    rng = torch.Generator().manual_seed(seed)
    f_NK = torch.randn(n, changes, generator=rng).clamp_min(0)
    write_KD = torch.randn(changes, width, generator=rng)
    noise_NSD = torch.randn(n, 1, width, generator=rng)
    half_N = torch.arange(n) * 8 // n % 2 == 0
    return f_NK, write_KD, noise_NSD, half_N


def test_energy_along_expects_nothing_of_unrelated_strengths():
    """Or a little less: a direction fitted to noise costs 2 / N of the noise's energy on the other half."""
    energies = []
    for seed in range(60):
        f_NK, _, noise_NSD, half_N = case(seed)
        energies.append(
            energy_along(f_NK, noise_NSD + 3.0, half_N, torch.zeros(4, dtype=torch.bool)) / noise_NSD.pow(2).sum()
        )
    energies = torch.stack(energies)
    error = energies.std(0) / 60**0.5
    assert (energies.mean(0) < 4 * error).all()
    assert (energies.mean(0) > -2 / 400 - 4 * error).all()
    assert float(energies.abs().max()) < 0.03


def test_energy_along_recovers_what_was_planted():
    f_NK, write_KD, noise_NSD, half_N = case(0)
    varying = torch.zeros(4, dtype=torch.bool)
    for k in range(4):
        part_ND = f_NK[:, k : k + 1] * write_KD[k]
        centered = (f_NK[:, k] - f_NK[:, k].mean()).pow(2).sum() * write_KD[k].pow(2).sum()
        alone = energy_along(f_NK, part_ND[:, None], half_N, varying)
        assert float(alone[k]) == pytest.approx(float(centered), rel=0.02)
        among = energy_along(f_NK, part_ND[:, None] + noise_NSD + 2.0, half_N, varying)
        assert float(among[k]) == pytest.approx(float(centered), rel=0.25)
        assert int(among.argmax()) == k


def test_constant_changes_are_asked_about_the_offset():
    _, write_KD, noise_NSD, half_N = case(0)
    ones = torch.ones(400, 1)
    constant = torch.tensor([True])
    whole = energy_along(ones, write_KD[0].expand(400, 1, -1) + 0 * noise_NSD, half_N, constant)
    assert float(whole) == pytest.approx(400 * float(write_KD[0].pow(2).sum()), rel=1e-6)
    noise = noise_NSD - noise_NSD.mean(0)
    assert abs(float(energy_along(ones, noise, half_N, constant))) < 0.02 * float(noise.pow(2).sum())


def test_a_strength_that_is_never_on_has_no_energy():
    f_NK, _, noise_NSD, half_N = case(0)
    energy = energy_along(torch.zeros_like(f_NK), noise_NSD, half_N, torch.zeros(4, dtype=torch.bool))
    assert torch.equal(energy, torch.zeros(4, dtype=torch.float64))


def test_energy_is_the_same_in_any_order_of_tokens():
    f_NK, write_KD, noise_NSD, half_N = case(3)
    order = torch.randperm(400, generator=torch.Generator().manual_seed(0))
    varying = torch.zeros(4, dtype=torch.bool)
    torch.testing.assert_close(
        energy_along(f_NK, noise_NSD, half_N, varying),
        energy_along(f_NK[order], noise_NSD[order], half_N[order], varying),
    )


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    return planted_pairs.planted(tmp_path_factory.mktemp("planted") / "harvest")


def test_samples_are_whole_held_out_documents(planted):
    tokens = planted.tokens
    sample = Sample.take(planted.harvest, tokens, split="held_out", limit=300, seed=0)
    assert 300 <= len(sample.row_N) < 400
    assert all(tokens.held_out[d] for d in sample.document_N.tolist())
    assert len(sample.row_N) == sum(len(tokens.rows[row]) for row in sample.rows)
    assert sample.rows == sorted(sample.rows) == sample.row_N.unique_consecutive().tolist()
    plain = Sample.take(planted.harvest, tokens, split="train", limit=10**6, seed=0, kinds=["plain"])
    assert {tokens.documents[d].kind for d in plain.document_N.tolist()} == {"plain"}
    assert not any(tokens.held_out[d] for d in plain.document_N.tolist())


def test_streams_of_tuned_are_the_samples_own(planted):
    sample = Sample.take(planted.harvest, planted.tokens, split="held_out", limit=300, seed=0)
    runs = [(batch, planted.pair.common_start(batch.ids_BT, sample.sites)) for batch in sample.batches(500)]
    again = streams_of(planted.pair.tuned, sample, runs)
    torch.testing.assert_close(again, sample.streams_NSMD[:, :, TUNED], atol=1e-5, rtol=1e-4)


def test_what_a_change_takes_away_is_what_every_row_says_for_itself(planted):
    sample = Sample.take(planted.harvest, planted.tokens, split="held_out", limit=300, seed=0)
    everywhere = MeanDifference().find(SimpleNamespace(harvest=planted.harvest)).changes[0]
    never = replace(everywhere, id="never", threshold=float("inf"))
    f_NK = torch.stack([sample.strength(everywhere), sample.strength(never)], 1)
    kl_N, less_NK = removed(planted.pair, [everywhere, never], f_NK, sample, 500)
    assert not less_NK[:, 1].any() and less_NK[:, 0].any()
    for row in sample.rows[:5]:
        mine = sample.row_N == row
        ids = torch.tensor([planted.tokens.rows[row]])
        tuned = sample.streams_NSMD[mine, 0, TUNED][None]
        write = (f_NK[mine, 0, None] * everywhere.difference_SD[0])[None]
        base, whole, without = (
            model.logits(model.states(ids, start))[0].log_softmax(-1)
            for model, start in (
                (planted.pair.base, None),
                (planted.pair.tuned, None),
                (planted.pair.tuned, Start(planted_pairs.SITE, tuned - write)),
            )
        )
        torch.testing.assert_close(kl_N[mine], kl_divergence(whole, base), atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(
            less_NK[mine, 0], kl_divergence(whole, base) - kl_divergence(without, base), atol=2e-4, rtol=1e-3
        )


def test_changes_that_say_the_same_do_not_crowd_out_one_that_speaks_for_others():
    nats_KD = torch.tensor([[5.0, 5, 0, 0], [4, 4, 0, 0], [4, 4, 0, 0], [0, 0, 1, 1], [-9, -9, -9, -9]]).double()
    gap_D = torch.full((4,), 6.0).double()
    assert cover(nats_KD, gap_D, range(5)) == [0, 1, 3, 2, 4] and cover(nats_KD, gap_D, [2, 3]) == [2, 3]


def test_one_half_alone_shows_nothing_and_what_is_not_finite_is_refused():
    rng = torch.Generator().manual_seed(3)
    f_NK, delta = torch.rand(20, 2, generator=rng), torch.randn(20, 1, 4, generator=rng)
    one_half = torch.zeros(20, dtype=torch.bool)
    assert energy_along(f_NK, delta, one_half, torch.tensor([False, True])).tolist() == [0.0, 0.0]
    with pytest.raises(NumericsError, match="not finite"):
        max_t(torch.tensor([float("nan")]), torch.ones(3, 1))


OLDER = Path(__file__).parents[1] / "records" / "older"


def test_an_older_ranking_opens_and_is_kept_anew_with_every_number(tmp_path):
    records = json.loads((OLDER / "ranking.json").read_text())
    changes = {record["change"]: SimpleNamespace(id=record["change"]) for record in records}
    ranking = Ranking.load(OLDER, changes)
    for ranked, record in zip(ranking.ranked, records, strict=True):
        assert dict(zip(ranked.depth.places, ranked.depth.values[0], strict=True)) == record["depth"]
        assert (vars(ranked.score), vars(ranked.effect)) == (record["score"], record["effect"])
        assert (list(ranked.null), ranked.p, ranked.change.id) == (record["null"], record["p"], record["change"])
    ranking.save(tmp_path)
    assert Ranking.load(tmp_path, changes).ranked == ranking.ranked
