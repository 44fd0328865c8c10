"""Finders of few kinds: which maps write into the stream, what their weights teach, and the floor under all finders."""

from __future__ import annotations

from pathlib import Path

import planted_pairs
import pytest
import tiny_models
import torch
from planted_pairs import SITE
from torch.nn.functional import cosine_similarity

from tunediff import dictionaries
from tunediff.changes.finders.base import View
from tunediff.changes.finders.weight_spectrum import writers
from tunediff.core import variants
from tunediff.core.axes import BASE, TUNED
from tunediff.dictionaries.schedule import FitSettings
from tunediff.harvests.harvest import Harvest, HarvestSettings, harvest
from tunediff.models.network import LanguageModel
from tunediff.models.pair import Pair
from tunediff.records.change import Change
from tunediff.records.site import Site

OUTPUTS = {"o_proj", "down_proj", "dense", "dense_4h_to_h", "fc2", "out_proj", "c_proj"}
"""What families call the maps that write into the stream."""


def find(name: str, pair: Pair, harvested: Harvest, seed: int = 0, candidates: int = 12) -> list[Change]:
    spec = dictionaries.spec("delta")
    view = View(harvested, Path(), seed, candidates, spec, FitSettings(), lambda: pytest.fail("not asked for"), pair)
    return variants.load("tunediff.changes.finders", name)().find(view).changes


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> planted_pairs.Planted:
    return planted_pairs.planted(tmp_path_factory.mktemp("planted") / "harvest")


def written(change: Change) -> torch.Tensor:
    return change.difference_SD[0].double()


# Weight spectrum


@pytest.mark.parametrize("family", sorted(tiny_models.configs()))
def test_writers_are_the_output_maps_of_both_parts(family):
    model = LanguageModel(tiny_models.module(family), None, family)
    names = {m: name.rpartition(".")[2] for name, m in model.blocks.named_modules()}
    for layer in range(model.depth):
        found = [names[m] for m in writers(model, Site(layer))]
        assert len(found) == 2 * (layer + 1) and set(found) <= OUTPUTS
    if family != "opt":  # keeps its MLP's maps in the block itself
        for kind in ("attn", "mlp"):
            (only,) = writers(model, Site(1, kind))
            assert only in list(model.family.part(model.blocks[1], kind).modules())


def test_the_weights_alone_name_the_planted_direction(planted):
    first = find("weight_spectrum", planted.pair, planted.harvest)[0]
    assert abs(cosine_similarity(written(first), planted.direction_D.double(), dim=0)) > 0.99
    assert first.origin["most_in"] == f"{planted_pairs.LAYER}.mlp.down_proj" and first.origin["share_there"] > 0.9


def test_spectra_are_those_of_the_maps_side_by_side(planted):
    """Against an ordinary singular value decomposition; what lies above the site plays no part."""
    mine = [d for d in planted.pair.deltas() if d.name.endswith(("o_proj", "down_proj")) and d.name[0] in "01"]
    u, s, _ = torch.linalg.svd(torch.cat([d.added() for d in mine], 1))
    changes = find("weight_spectrum", planted.pair, planted.harvest)
    assert len(mine) == 4 and all(c.origin["maps"] == 4 for c in changes)
    for rank, change in enumerate(changes):
        assert abs(float(written(change) @ u[:, rank])) == pytest.approx(1, abs=1e-5)
        assert change.origin["energy_share"] == pytest.approx(float(s[rank] ** 2 / s.square().sum()), rel=1e-5)


def test_an_adapters_directions_are_those_of_the_merged_model(tmp_path):
    network = tiny_models.module("llama")
    base = tiny_models.save(tmp_path / "base", network)
    adapter = tiny_models.adapter(tmp_path / "lora", network)
    one = Pair.load(base, adapter)
    merged = Pair.load(base, adapter).tuned.module.merge_and_unload()
    whole = Pair.load(base, tiny_models.save(tmp_path / "merged", merged))
    tokens, settings = planted_pairs.corpus_tokens(), HarvestSettings(store="float32", abnormal=50.0)
    found = [
        find("weight_spectrum", pair, harvest(pair, tokens, [SITE, Site(2, "mlp")], tmp_path / name, settings))
        for name, pair in (("one", one), ("whole", whole))
    ]
    assert [c.id for c in found[0]] == [c.id for c in found[1]] and len(found[0]) == 8
    for a, b in zip(*found):
        assert a.origin["maps"] == b.origin["maps"] == (1 if a.sites[0].kind == "mlp" else 4)
        assert a.origin["share_there"] == pytest.approx(b.origin["share_there"], rel=1e-3)
        torch.testing.assert_close(a.write_SMD, b.write_SMD, atol=1e-3, rtol=1e-3)


def test_a_tune_that_writes_nothing_of_its_own_gives_no_direction(planted):
    """Queries are as wide as the stream and do not write into it."""
    network = tiny_models.module("llama")
    tuned = tiny_models.module("llama")
    with torch.no_grad():
        for block in tuned.model.layers:
            block.self_attn.q_proj.weight.mul_(1.5)
    pair = planted_pairs.pair_of(network, tuned)
    assert len(pair.deltas()) == 3
    assert find("weight_spectrum", pair, planted.harvest) == []


# Random directions


def test_random_directions_are_as_many_as_candidates_and_the_seeds_own(planted):
    one, again, other = (find("random_directions", planted.pair, planted.harvest, seed) for seed in (0, 0, 1))
    assert len(one) == len({c.id for c in one}) == 12
    assert all(torch.equal(a.write_SMD, b.write_SMD) for a, b in zip(one, again))
    assert not any(torch.equal(a.write_SMD, b.write_SMD) for a, b in zip(one, other))


def test_random_directions_have_the_covariance_of_the_difference(planted):
    """Their mean share of the energy is that of a Gaussian's directions, far above even directions' 1 / D."""
    changes = find("random_directions", planted.pair, planted.harvest, candidates=400)
    x_NSMD = planted.harvest.read("train", torch.arange(planted.harvest.count("train")))
    delta_ND = (x_NSMD[:, 0, TUNED] - x_NSMD[:, 0, BASE]).double()
    covariance = (delta_ND - delta_ND.mean(0)).T @ (delta_ND - delta_ND.mean(0)) / len(delta_ND)
    drawn = torch.distributions.MultivariateNormal(torch.zeros(len(covariance)).double(), covariance)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        v_KD = torch.nn.functional.normalize(drawn.sample((4000,)), dim=1)
    expected = float(((v_KD @ covariance) * v_KD).sum(1).mean() / covariance.trace())
    shares = [c.origin["energy_share"] for c in changes]
    assert expected > 5 / len(covariance)
    assert sum(shares) / len(shares) == pytest.approx(expected, rel=0.15)
    v = written(changes[0])
    assert shares[0] == pytest.approx(float(v @ covariance @ v / covariance.trace()), rel=1e-3)
