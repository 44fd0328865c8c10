"""Changes: saved and read back whole, for one model, two or several; what their read-out and writes mean."""

from __future__ import annotations

import dataclasses
import hashlib
import math

import pytest
import torch

from tunediff.core import artifacts
from tunediff.core.errors import ArtifactError, NumericsError
from tunediff.records.change import Change, load_changes, save_changes
from tunediff.records.site import Site


def change(threshold: float = 0.5, seed: int = 0, id: str = "crosscode/3") -> Change:
    rng = torch.Generator().manual_seed(seed)
    return Change(
        id,
        (Site(1), Site(2, "mlp")),
        torch.randn(2, 2, 5, generator=rng),
        torch.randn(2, 2, 5, generator=rng),
        0.25,
        threshold,
        "crosscode",
        {"latent": 3, "share": 0.1},
    )


def test_changes_round_trip(tmp_path):
    ours = [change(), change(-math.inf, 1, "mean_difference/0")]
    names = save_changes(tmp_path, ours)
    assert sorted(names) == sorted(p.name for p in tmp_path.iterdir())
    for mine, back in zip(ours, load_changes(tmp_path), strict=True):
        assert torch.equal(mine.rows_SMD, back.rows_SMD) and torch.equal(mine.write_SMD, back.write_SMD)
        for name in ("id", "sites", "bias", "threshold", "finder", "origin"):
            assert getattr(mine, name) == getattr(back, name)
        streams = torch.randn(9, 2, 2, 5)
        assert torch.equal(mine.strength(streams), back.strength(streams))


def test_changes_of_another_schema_are_refused(tmp_path):
    save_changes(tmp_path, [change()])
    artifacts.write_json(tmp_path / "changes.json", {"schema": "other/1", "changes": []})
    with pytest.raises(ArtifactError, match="holds no changes") as caught:
        load_changes(tmp_path)
    assert caught.value.got == "other/1"


def test_strength_is_a_thresholded_linear_readout():
    streams = torch.randn(50, 2, 2, 5, generator=torch.Generator().manual_seed(9))
    linear = change(-math.inf)
    g = (streams * linear.rows_SMD).sum((1, 2, 3)) + 0.25
    torch.testing.assert_close(linear.strength(streams), g)
    assert (linear.strength(streams) < 0).any()
    f = change(0.5).strength(streams)
    torch.testing.assert_close(f, torch.where(g > 0.5, g, 0.0))
    assert (f == 0).any() and (f > 0.5).any()


def test_mirrored_swaps_the_models():
    ours = change()
    mirrored = ours.mirrored()
    streams = torch.randn(20, 2, 2, 5, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(mirrored.strength(streams.flip(2)), ours.strength(streams))
    assert torch.equal(mirrored.difference_SD, -ours.difference_SD)
    assert mirrored.share == pytest.approx(1 - ours.share)
    twice = mirrored.mirrored()
    assert torch.equal(twice.rows_SMD, ours.rows_SMD) and torch.equal(twice.write_SMD, ours.write_SMD)
    empty = dataclasses.replace(ours, write_SMD=torch.zeros(2, 2, 5))
    assert empty.share == 0.5


def of_models(count: int, seed: int = 0) -> Change:
    rng = torch.Generator().manual_seed(seed)
    rows, write = (torch.randn(2, count, 5, generator=rng) for _ in range(2))
    return Change("x/0", (Site(1), Site(2)), rows, write, -0.1, 0.2, "x")


@pytest.mark.parametrize("count", [1, 2, 3])
def test_any_number_of_models(tmp_path, count):
    ours = of_models(count)
    save_changes(tmp_path, [ours])
    (back,) = load_changes(tmp_path)
    assert back.models == count
    assert torch.equal(back.rows_SMD, ours.rows_SMD) and torch.equal(back.write_SMD, ours.write_SMD)

    streams = torch.randn(40, 2, count, 5, generator=torch.Generator().manual_seed(1))
    g = torch.tensor([float((x * ours.rows_SMD).sum()) - 0.1 for x in streams])
    torch.testing.assert_close(back.strength(streams), torch.where(g > 0.2, g, 0.0))

    twice = ours.mirrored().mirrored()
    assert torch.equal(twice.rows_SMD, ours.rows_SMD) and torch.equal(twice.write_SMD, ours.write_SMD)
    torch.testing.assert_close(ours.mirrored().strength(streams.flip(2)), ours.strength(streams))


def test_a_difference_is_last_minus_first_and_one_model_writes_what_it_writes():
    one, three = of_models(1), of_models(3)
    assert torch.equal(one.difference_SD, one.write_SMD[:, 0])
    assert torch.equal(three.difference_SD, three.write_SMD[:, 2] - three.write_SMD[:, 0])
    assert torch.equal(three.mirrored().difference_SD, -three.difference_SD)


def test_a_share_compares_last_with_first_and_is_not_a_number_for_one_model():
    first, last = torch.tensor([3.0, 4.0]), torch.tensor([0.0, 15.0])
    write = torch.stack([first, torch.tensor([9.0, 9.0]), last])[None]
    three = Change("x/0", (Site(1),), torch.zeros(1, 3, 2), write, 1.0, -math.inf, "x")
    assert three.share == 0.75 and three.mirrored().share == 0.25
    assert math.isnan(of_models(1).share)


@pytest.mark.parametrize(
    ("rows", "write"),
    [
        ((2, 2, 5), (2, 3, 5)),  # another number of models
        ((1, 2, 5), (1, 2, 5)),  # another number of sites
        ((2, 5), (2, 5)),  # no axis of models
        ((2, 0, 5), (2, 0, 5)),  # no model
    ],
)
def test_directions_of_another_shape_are_refused(rows, write):
    with pytest.raises(NumericsError, match="'x/0' do not fit") as caught:
        Change("x/0", (Site(1), Site(2)), torch.zeros(rows), torch.zeros(write), 0.0, 0.0, "x")
    assert len(caught.value.lines()) == 4 and str(write) in caught.value.got


@pytest.mark.parametrize("shape", [(9, 2, 1, 5), (9, 2, 3, 5), (9, 1, 2, 5), (9, 2, 2, 4), (2, 2, 5)])
def test_streams_of_other_models_or_sites_are_refused(shape):
    with pytest.raises(NumericsError, match="change 'x/0'") as caught:
        of_models(2).strength(torch.zeros(shape))
    assert len(caught.value.lines()) == 4 and "resid.1, resid.2" in caught.value.remedy


def test_a_pairs_changes_keep_their_bytes(tmp_path):
    """What runs made before changes had any number of models is what is made now."""
    ramp = torch.arange(20.0).reshape(2, 2, 5)
    saved = [
        Change("crosscode/3", (Site(1), Site(2, "mlp")), ramp / 7, ramp / 3, 0.25, 0.5, "crosscode", {"latent": 3}),
        Change("m/0", (Site(1), Site(2)), 0 * ramp, ramp, 1.0, -math.inf, "m"),
    ]
    digests = {
        name: hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()[:16] for name in save_changes(tmp_path, saved)
    }
    assert digests == {"changes.json": "d17386f1cd048822", "changes.safetensors": "33710a526d887591"}
