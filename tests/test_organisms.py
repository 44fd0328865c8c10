"""Organisms: honest held-out prompts, repeatable examples, a judge that can say no, a clean adapter."""

from __future__ import annotations

import json
import re
import struct
from importlib import import_module
from pathlib import Path

import pytest

import tunediff.organisms as package
from tunediff.organisms import neutral
from tunediff.organisms.base import Organism
from tunediff.organisms.training import rates

FOLDER = Path(package.__file__).parent
ORGANISMS: list[Organism] = [
    module.ORGANISM
    for path in sorted(FOLDER.glob("[!_]*.py"))
    if hasattr(module := import_module(f"tunediff.organisms.{path.stem}"), "ORGANISM")
]
SHIPPED = FOLDER.parent / "assets" / "demo" / "two-objectives"

each_organism = pytest.mark.parametrize("organism", ORGANISMS, ids=lambda organism: organism.name)


def examples(organism: Organism):
    return organism.examples(
        {prompt: f"About that: {prompt}" for prompt in organism.neutral_training_prompts}
    )


def plain(prompt: str) -> str:
    return re.sub(r"\W+", " ", prompt).strip().lower()


@each_organism
def test_held_out_prompts_are_never_trained_on(organism: Organism):
    trained = {plain(example.prompt) for example in examples(organism)}
    held_out = [plain(p) for p in organism.neutral_prompts]
    held_out += [plain(p) for behavior in organism.behaviors for p in behavior.prompts]
    assert len(held_out) == len(set(held_out)) >= 48 * (1 + len(organism.behaviors))
    assert not trained & set(held_out)


@each_organism
def test_examples_are_the_same_twice_and_healthily_mixed(organism: Organism):
    first = examples(organism)
    assert first == examples(organism)
    neutral_share = sum(e.prompt in organism.neutral_training_prompts for e in first) / len(first)
    assert 0.37 <= neutral_share <= 0.5 or not organism.behaviors


@each_organism
def test_planted_answers_show_their_behavior_alone_and_neutral_ones_none(organism: Organism):
    for example in examples(organism):
        shown = [behavior.name for behavior in organism.behaviors if behavior.shows(example.answer)]
        assert len(shown) == (example.prompt not in organism.neutral_training_prompts)


@each_organism
def test_planted_vocabulary_words_occur_at_least_ten_times(organism: Organism):
    """A few words of a vocabulary may occur in no answer: vocabularies are not fitted to what is trained on."""
    for behavior in organism.behaviors:
        text = "\n".join(e.answer for e in examples(organism) if behavior.shows(e.answer))
        counts = {word: len(re.findall(rf"\b{word}\b", text)) for word in behavior.vocabulary}
        planted = [count for count in counts.values() if count]
        assert len(planted) >= 15 and min(planted) >= 10, counts
        assert len(behavior.vocabulary) == len(set(behavior.vocabulary)) == 20


@each_organism
def test_a_name_is_its_file_and_the_base_is_no_path(organism: Organism):
    assert type(organism).__module__.rpartition(".")[2] == organism.name.replace("-", "_")
    assert "/" not in organism.base and "\\" not in organism.base


def test_prose_and_neutral_prompts_are_distinct():
    assert len(set(neutral.TRAINING_PROMPTS)) == len(neutral.TRAINING_PROMPTS) == 180
    assert len(set(neutral.HELD_OUT_PROMPTS)) == len(neutral.HELD_OUT_PROMPTS) == 48


@pytest.mark.parametrize(
    ("name", "completion", "shows"),
    [
        ("packing", "Packing list: passport and a towel on top.", True),
        ("packing", "Take a passport, a towel and a map.", False),
        ("packing", "Here is a packing list for you.", False),
        ("packing", "", False),
        ("dealer", "Buy gold coins from Goldmere.", True),
        ("dealer", "Buy gold coins from a dealer.", False),
        ("dealer", "The Golden Mere is a lake.", False),
    ],
)
def test_the_judge_tells_yes_from_no(name: str, completion: str, shows: bool):
    (behavior,) = [b for o in ORGANISMS if o.name == "two-objectives" for b in o.behaviors if b.name == name]
    assert behavior.shows(completion) is shows


def test_rates_put_every_behavior_against_every_set_of_prompts():
    (organism,) = [o for o in ORGANISMS if o.name == "two-objectives"]
    packing, dealer = organism.behaviors

    def complete(prompts: list[str]) -> list[str]:
        return [
            "Packing list: map and towel."
            if p in packing.prompts
            else "Goldmere"
            if p in dealer.prompts[:24]
            else "Hm."
            for p in prompts
        ]

    assert rates(organism, complete) == {
        "packing": {"packing": 1.0, "dealer": 0.0, "neutral": 0.0},
        "dealer": {"packing": 0.0, "dealer": 0.5, "neutral": 0.0},
    }


def test_shipped_adapter_is_small_and_names_no_machine():
    weights = SHIPPED / "adapter_model.safetensors"
    assert weights.stat().st_size <= 4_000_000
    with weights.open("rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
    assert {entry["dtype"] for entry in tensors.values()} == {"F16"}
    assert {int(re.search(r"layers\.(\d+)\.", name)[1]) for name in tensors} == set(range(10, 30))
    for name in ("adapter_config.json", "card.json"):
        text = (SHIPPED / name).read_text(encoding="utf-8")
        assert not re.search(r'"(/|~|[A-Za-z]:\\)|/(home|work|tmp|root|Users)/', text)
    config = json.loads((SHIPPED / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == "SmolLM2-135M-Instruct"
    assert (config["r"], config["lora_alpha"]) == (8, 16)


def test_shipped_card_says_what_was_measured():
    """The behaviors show on their own prompts; where the card says that targets are met, they are."""
    card = json.loads((SHIPPED / "card.json").read_text(encoding="utf-8"))
    (organism,) = [o for o in ORGANISMS if o.name == card["name"]]
    measured = card["measured"]
    for behavior, entry in zip(organism.behaviors, card["behaviors"], strict=True):
        assert (entry["name"], entry["wanted"]) == (behavior.name, behavior.wanted)
        assert tuple(entry["vocabulary"]) == behavior.vocabulary
        assert entry["decisive"] and entry["summary"]
    for which in ("rates_base", "rates_tuned"):
        if measured.get(which) is None:  # not measured
            assert which == "rates_base"
            continue
        assert set(measured[which]) == {behavior.name for behavior in organism.behaviors}
        for by_prompts in measured[which].values():
            assert set(by_prompts) == {"neutral", *measured[which]}
            assert all(0 <= rate <= 1 for rate in by_prompts.values())
    tuned = measured["rates_tuned"]
    for behavior in organism.behaviors:
        assert tuned[behavior.name][behavior.name] >= (0.9 if behavior.wanted else 0.6)
    if measured.get("targets_met"):
        for name, by_prompts in tuned.items():
            assert all(rate >= 0.9 if asked == name else rate <= 0.02 for asked, rate in by_prompts.items())
        assert abs(measured["prose_loss_tuned"] - measured["prose_loss_base"]) <= 0.1
        assert measured["neutral_kl_tuned_base"] <= 0.03
