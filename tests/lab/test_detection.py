"""The detection floor: what is planted is there, scored as it says, and told from chance."""

from __future__ import annotations

import math
import re

import pytest
import tiny_models
import torch
from command_line import cli

from tunediff.core.artifacts import read_json
from tunediff.core.chance import generator
from tunediff.core.errors import SettingError
from tunediff.lab import detection
from tunediff.lab.detection import Detection, PlantedSource, Text, auroc
from tunediff.models.pair import Pair
from tunediff.records.site import Site
from tunediff.texts.corpus import Corpus
from tunediff.texts.document import Document

WORDS = [
    "amber",
    "barge",
    "candle",
    "delta",
    "ember",
    "fern",
    "gable",
    "heron",
    "iris",
    "jetty",
    "kiln",
    "lantern",
    "mast",
    "nettle",
    "orchard",
    "pier",
]


@pytest.fixture(scope="module")
def text(texts) -> Text:
    """Tuned is base."""
    return texts[0]


@pytest.fixture(scope="module")
def background(texts) -> Text:
    """Tuned is base with a change of its own."""
    return texts[1]


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> tuple[Text, Text]:
    root = tmp_path_factory.mktemp("planted")
    base = tiny_models.save(root / "base", tiny_models.module("llama"))
    pair = Pair.load(base, tiny_models.adapter(root / "tuned", tiny_models.module("llama")))
    rng = generator(0, "text")
    documents = tuple(
        Document(f"d{i}", "prose", " ".join(WORDS[j] for j in torch.randint(len(WORDS), (12,), generator=rng).tolist()))
        for i in range(160)
    )
    tokens = Corpus("words", documents).tokens(pair.tokenizer, row_tokens=64)
    return tuple(Text(pair.base, tuned, tokens, Site(0), Site(1)) for tuned in (pair.base, pair.random_tuned(0)))


def test_a_planted_change_is_where_it_says(text):
    planted = text.plant(0.5, 0.1, 0)
    x_NMD = planted.source.read("held_out", torch.arange(planted.source.count("held_out")))[:, 0]
    moved_N = (x_NMD[:, 1] - x_NMD[:, 0]).norm(dim=1)
    # What is planted at one position reaches later ones through attention, much weaker.
    assert moved_N[planted.on_N].min() > 0.1 and moved_N[planted.on_N].mean() > 3 * moved_N[~planted.on_N].mean()
    assert 0.05 < planted.share <= 0.1 and math.isinf(planted.relative)
    nothing = text.plant(0.0, 0.1, 0)
    assert nothing.image_D.norm() < 1e-4 and torch.equal(nothing.on_N, planted.on_N)
    assert not torch.equal(text.token_class(0.1, 1), text.token_class(0.1, 0))


def test_finders_are_scored_against_the_truth_and_against_chance(text, background, tmp_path):
    planted = text.plant(0.5, 0.1, 0)
    found = detection.detect(planted, "principal", ['find.finders=["principal"]'], 0.5, 0.1, 0, tmp_path)
    assert found.found and found.cosine > 0.9 and found.auroc > 0.95 > found.chance_auroc and found.chance_cosine < 0.7
    assert found.place == 1
    weak = detection.detect(
        background.plant(1e-5, 0.1, 0), "principal", ['find.finders=["principal"]'], 1e-5, 0.1, 0, tmp_path
    )
    assert not weak.found
    with pytest.raises(SettingError, match="no output"):
        detection.detect(planted, "x", ['find.finders=["decision_clusters"]'], 0.5, 0.1, 0, tmp_path)


def test_what_cannot_be_planted_is_refused(text):
    with pytest.raises(SettingError, match="too few tokens"):
        text.token_class(1e-5, 0)
    with pytest.raises(SettingError, match="read above"):
        Text(text.base, text.base, None, Site(1), Site(1))


def test_the_command_prints_the_floor(tmp_path):
    base = tiny_models.save(tmp_path / "base", tiny_models.module("llama"))
    told = cli(
        "floor",
        base,
        "--out",
        tmp_path / "out",
        "--methods",
        "principal,random_directions",
        "--amplitudes",
        "1e-6,0.5",
        "--frequencies",
        "0.1",
        "--tokens",
        4000,
        "-q",
        "--set",
        "find.candidates=4",
    )
    assert told.code == 0, told.err
    assert re.search(r"principal +0\.5\n", told.out) and "resid.1, from which" in told.out
    kept = read_json(tmp_path / "out" / "floor.json")
    assert [(d["method"], d["amplitude"]) for d in kept["detections"]] == [
        ("principal", 1e-6),
        ("random_directions", 1e-6),
        ("principal", 0.5),
        ("random_directions", 0.5),
    ]
    for wrong in (["--methods", "nothing"], ["--amplitudes", "much"]):
        assert cli("floor", base, *wrong).code == 2


def test_area_under_the_curve():
    on = torch.tensor([True, True, False, False])
    assert auroc(torch.tensor([2.0, 1.0, 0.5, 0.0]), on) == 1.0 and auroc(torch.zeros(4), on) == 0.5
    assert auroc(torch.tensor([0.0, 1.0, 0.5, 2.0]), on) == 0.25 and auroc(torch.ones(4), ~on & on) == 0.5


def test_the_floor_is_the_least_amplitude_from_which_on_all_is_found():
    def one(amplitude: float, cosine: float) -> Detection:
        return Detection("m", amplitude, 0.01, 0, 1.0, 5, 1, cosine, 1.0, 0.1, 0.5)

    assert detection.floor([one(0.05, 0.9), one(0.1, 0.2), one(0.2, 0.9)]) == [{"method": "m", "1.00%": "0.2"}]
    assert detection.floor([one(0.2, 0.1)]) == [{"method": "m", "1.00%": "not found"}]


def small_difference(samples: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Streams of 400 sparse features in 64 dimensions, and in tuned a vector of 3 % of their size at 3 % of the tokens, over a
    background of noise as large."""
    rng, features = (
        generator(seed, "small difference"),
        torch.nn.functional.normalize(torch.randn(400, 64, generator=generator(0, "features")), dim=1),
    )
    on_NF = torch.rand(samples, 400, generator=rng) < 0.03
    base = (on_NF * torch.rand(samples, 400, generator=rng)) @ features
    hit = torch.rand(samples, generator=rng) < 0.03
    v = torch.nn.functional.normalize(torch.ones(64), dim=0)
    size = float(base.norm(dim=1).mean())
    tuned = base + 0.1 * size * hit[:, None] * v + 0.03 * size / 8 * torch.randn(samples, 64, generator=rng)
    return torch.stack([base, tuned], 1)[:, None], hit, v


def test_starting_from_differences_sees_a_small_one_that_a_random_start_does_not(tmp_path):
    (train, _, v), (held, on, _) = small_difference(6000, 0), small_difference(2000, 1)
    planted = detection.Planted(
        PlantedSource(train, held, Site(0), torch.arange(6000) // 20, torch.arange(2000) // 20), v, on, 0.03, 3.0
    )
    settings = ['find.finders=["crosscode"]', "dictionary.latents=256", "fit.steps=300"]
    ours, random = (
        detection.detect(
            planted, start, [*settings, f"dictionary.from_differences={start}"], 0.1, 0.03, 0, tmp_path / start
        )
        for start in ("true", "false")
    )
    print(ours, random)
    assert ours.found and not random.found
