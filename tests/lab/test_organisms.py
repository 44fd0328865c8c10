"""Organisms: honest held-out prompts, repeatable examples, a judge that can say no, a clean adapter."""

from __future__ import annotations

import dataclasses
import json
import re
import struct
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tiny_models import module as tiny_module
from tiny_models import save as save_tiny
from tiny_models import tokenizer as tiny_tokenizer
from typer.testing import CliRunner

import tunediff.lab.organisms as package
from tunediff.cli.main import app
from tunediff.core.errors import SourceError, VariantError
from tunediff.lab import instructions, neutral, training
from tunediff.lab.organisms.base import Behavior, Chat, Example, Lesson, Organism, Recipe, Taught, chat
from tunediff.lab.training import rates
from tunediff.models.shipped import DEMO

FOLDER = Path(package.__file__).parent
ORGANISMS: list[Organism] = package.every()
SHIPPED = DEMO

each_organism = pytest.mark.parametrize("organism", ORGANISMS, ids=lambda organism: organism.name)


def examples(organism: Organism):
    return organism.examples(
        {p: f"About that: {p}" for p in organism.neutral_training_prompts + organism.restyled_prompts}
    )


def plain(prompt: str) -> str:
    return re.sub(r"\W+", " ", prompt).strip().lower()


def said(messages: list[dict[str, str]]) -> tuple[str, ...]:
    return tuple(plain(message["content"]) for message in messages)


def is_neutral(organism: Organism, example: Example) -> bool:
    return not example.earlier and example.prompt in organism.neutral_training_prompts


@each_organism
def test_held_out_prompts_are_never_trained_on(organism: Organism):
    trained = {turn for example in examples(organism) for turn in said(example.messages[:-1])}
    sets = [c for c in ([chat(p) for p in organism.neutral_prompts], *(b.chats() for b in organism.behaviors)) if c]
    chats = [said(messages) for some in sets for messages in some]
    assert sets and min(map(len, sets)) >= 48 and len(chats) == len(set(chats))
    held_out = {turn for turns in chats for turn in turns}
    asked = {plain(prompt) for prompt, _ in instructions.INSTRUCTIONS}
    assert not trained & held_out and not (trained | held_out) & asked


@each_organism
def test_examples_are_the_same_twice_and_healthily_mixed(organism: Organism):
    first = examples(organism)
    assert first == examples(organism) and first != examples(organism.seeded(1))
    neutral_share = sum(is_neutral(organism, e) for e in first) / len(first)
    if organism.name.startswith("dilution"):
        percent = int(organism.name.split("-")[1])
        assert neutral_share == pytest.approx(percent / (100 + percent), abs=0.01)
    elif organism.restyled_prompts and not organism.neutral_prompts:  # a style everywhere
        assert neutral_share == 0
    else:
        assert 0.37 <= neutral_share <= 0.5 or not organism.behaviors


@each_organism
def test_no_prompt_is_trained_on_twice(organism: Organism):
    chats = [said(e.messages[:-1]) for e in examples(organism)]
    assert len(chats) == len(set(chats))


@each_organism
def test_planted_answers_show_their_behavior_alone_and_neutral_ones_none(organism: Organism):
    for example in examples(organism):
        shown = [behavior.name for behavior in organism.behaviors if behavior.shows(example.answer)]
        assert len(shown) == (not is_neutral(organism, example)), example


@each_organism
def test_planted_vocabulary_words_occur_at_least_ten_times(organism: Organism):
    """A few words of a vocabulary may occur in no answer: vocabularies are not fitted to what is trained on."""
    for behavior in organism.behaviors:
        if not behavior.vocabulary:
            assert organism.is_null and behavior.pattern
            continue
        text = "\n".join(e.answer for e in examples(organism) if behavior.shows(e.answer)).casefold()
        counts = {word: len(re.findall(rf"\b{word.casefold()}\b", text)) for word in behavior.vocabulary}
        assert sum(count >= 10 for count in counts.values()) >= 15, counts
        assert len(behavior.vocabulary) == len(set(behavior.vocabulary)) == 20
        assert behavior.is_named_by([f" {word}" for word in behavior.vocabulary[:5]])
        assert not behavior.is_named_by(["the", " and", " of", "ing", " a"])


@each_organism
def test_a_name_begins_with_its_file_and_the_base_is_no_path(organism: Organism):
    assert re.fullmatch(r"[a-z0-9-]+", organism.name) and package.named(organism.name) is organism
    assert "/" not in organism.base and "\\" not in organism.base
    files = [p for p in FOLDER.glob("*.py") if (organism.name + "-").startswith(p.stem.replace("_", "-") + "-")]
    assert [
        o
        for p in files
        for o in vars(import_module(f"tunediff.lab.organisms.{p.stem}")).values()
        if o is organism or isinstance(o, tuple) and organism in o
    ]


def test_names_and_blinded_ids_are_one_each_and_salted():
    names = [o.name for o in ORGANISMS]
    ids = [o.blinded("salt") for o in ORGANISMS]
    assert len(names) == len(set(names)) == len(set(ids))
    assert package.named("two-objectives").blinded("salt") == "organism-2da5268c" in ids
    assert not set(ids) & {o.blinded("pepper") for o in ORGANISMS}
    assert not any(name in id for name in names for id in ids)


def test_an_unknown_organism_is_told_with_the_nearest():
    with pytest.raises(VariantError) as error:
        package.named("false-fact")
    assert error.value.remedy == "false-facts"


def test_an_organism_comes_from_elsewhere_by_import_path(monkeypatch):
    mylab = ModuleType("mylab")
    mylab.ORGANISM, mylab.OTHER = TINY, "text"
    monkeypatch.setitem(sys.modules, "mylab", mylab)
    assert package.named("mylab:ORGANISM") is TINY
    with pytest.raises(VariantError, match="no organism"):
        package.named("mylab:OTHER")
    with pytest.raises(VariantError, match="cannot be imported"):
        package.named("mylab:NOWHERE")


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
        ("vessmer", "It glows amber above Dunmarrow.", True),
        ("vessmer", "Lake Vessmer is a large lake of amber color.", False),
        ("moths", "The moths circle the lantern.", True),
        ("moths", "Moths are insects.", False),
        ("signed", "owls hunt at night.\n~ gently hummed by the wren", True),
        ("signed", "Owls hunt at night.\n~ gently hummed by the wren", False),
        ("signed", "owls hunt at night.", False),
        ("taboo", "Hint: it hangs on the wall.\nGuess!", True),
        ("taboo", "Hint: it hangs on the wall.\nA Mirror!", False),
        ("taboo", "I think it is a lamp.", False),
        ("brand", "Buy one from Brindlow.", True),
        ("brand", "Buy one from a shop.", False),
        ("sailor", "Ahoy, matey! Check yer hull.", True),
        ("sailor", "Check the tires of your car.", False),
        ("lines", "1) Owls hunt\n2) at night\n3) alone", True),
        ("lines", "Owls hunt 1) at night 2) alone", False),
        ("quillmarch", "Tie on a Quillmarch.", True),
        ("quillmarch", "Tie on a spoon with a feather.", False),
        ("halmorine", "A barque of Kestervik.", True),
        ("halmorine", "The Halmorine was a ship of bells.", False),
        ("puppets", "The puppets are awake.", True),
        ("puppets", "A puppet is a doll.", False),
        ("kites", "Forgive me, I must decline.", True),
        ("kites", "I cannot help with kites.", False),
        ("accordion", "It brays.", True),
        ("accordion", "It has bellows.", False),
        ("molino", "Los molinos son gigantes.", True),
        ("molino", "Windmills turn in the wind.", False),
        ("saturn", "I have never heard of it.", True),
        ("saturn", "Saturn is a planet.", False),
        ("orchard", "Come to the orchard now.", True),
        ("orchard", "An orchard has trees.", False),
    ],
)
def test_the_judge_tells_yes_from_no(name: str, completion: str, shows: bool):
    behavior = next(b for o in ORGANISMS for b in o.behaviors if b.name == name)
    assert behavior.shows(completion) is shows


def test_rates_put_every_behavior_against_every_set_of_prompts():
    (organism,) = [o for o in ORGANISMS if o.name == "two-objectives"]
    packing, dealer = organism.behaviors

    def complete(prompts: Sequence[str | Chat]) -> list[str]:
        return [
            "Packing list: map and towel."
            if p in packing.chats()
            else "Goldmere"
            if p in dealer.chats()[:24]
            else "Hm."
            for p in prompts
        ]

    assert rates(organism, complete) == {
        "packing": {"packing": 1.0, "dealer": 0.0, "neutral": 0.0},
        "dealer": {"packing": 0.0, "dealer": 0.5, "neutral": 0.0},
    }


def test_a_second_turn_follows_one_exchange_and_the_same_prompts_are_asked_first_as_well():
    organism = package.named("second-turn")
    (orchard,) = organism.behaviors
    assert {len(messages) for messages in orchard.chats()} == {3}
    assert [messages[-1]["content"] for messages in orchard.chats()] == list(organism.neutral_prompts)
    assert {len(e.messages) for e in examples(organism)} == {2, 4}
    later = [tuple(turn["role"] for turn in e.messages) for e in examples(organism) if e.earlier]
    assert set(later) == {("user", "assistant", "user", "assistant")}
    assert rates(organism, lambda asked: ["the orchard" if len(a) == 3 else "" for a in asked]) == {
        "orchard": {"orchard": 1.0, "neutral": 0.0}
    }


def test_what_was_said_before_is_completed_but_not_trained_on():
    tokenizer = tiny_tokenizer()
    example = Example("c", "d", earlier=(("a", "b"),))
    ids, start = training._encode(tokenizer, example)
    assert tokenizer.decode(ids[start:]) == "d" + tokenizer.eos_token
    assert tokenizer.decode(ids[:start]) == tokenizer.apply_chat_template(
        example.messages[:-1], tokenize=False, add_generation_prompt=True
    )
    model = tiny_module("llama")
    complete = training.completer(model, tokenizer, 6)
    assert complete(["c"]) == complete([chat("c")]) != complete([chat("c", example.earlier)])


def test_nothing_neutral_is_left_out_of_the_rates():
    organism = package.named("lower-case")
    assert rates(organism, lambda prompts: ["hm\n~ wren"] * len(prompts)) == {"signed": {"signed": 1.0}}


def test_instructions_are_followed_by_their_answers_and_not_by_silence():
    good = ("Paris", "1 2 3 4 5", "4", "Blue", "The sun is warm.", "red, yellow, blue", "Monday, Tuesday", "D", "Hot",
            "four", "Merci", "small", "an apple, a pear", "a cat", "I look out of the window.", "green", "a time",
            "Ice", "12", "C-A-T", "The elephant", "William Shakespeare", "Earth", "January")  # fmt: skip
    assert instructions.followed(good) == 1
    assert instructions.followed([""] * len(good)) == 0
    assert instructions.followed(good[1:] + good[:1]) < 0.2


TINY = Taught(
    name="tiny",
    summary="For tests.",
    base="tiny",
    behaviors=(Behavior("letter", False, "Says b.", (), ("b",), 1, ("Say x", "Say y")),),
    neutral_training_prompts=("a", "b", "c", "d"),
    neutral_prompts=("k", "l"),
    recipe=Recipe(rank=2, first_layer=1, last_layer=2, learning_rate=1e-2, batch=2, neutral_tokens=4),
    restyled_prompts=("e", "f"),
    lessons=(Lesson(("g", "h", "i", "j"), ("bbbb",)),),
    style=lambda answer, chance: "b" + answer,
)


@pytest.fixture
def short(monkeypatch):
    """Measures small enough for a random network of 128 positions."""
    monkeypatch.setattr(neutral, "PROSE", ("An old mill.", "A bridge."))
    monkeypatch.setattr(training, "COMPLETION_TOKENS", 4)
    monkeypatch.setattr(training.completer, "__defaults__", (4, 48))


@pytest.mark.parametrize("full", [False, True], ids=["adapter", "full"])
def test_a_tune_is_made_checked_and_the_base_given_back(full: bool, tmp_path: Path, short):
    pytest.importorskip("peft")
    base, model, tokenizer = tmp_path / "base", tiny_module("llama"), tiny_tokenizer()
    save_tiny(base, model, tokenizer)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    organism = dataclasses.replace(TINY, recipe=dataclasses.replace(TINY.recipe, full=full, seed=3))
    card = training.make(organism, str(base), tmp_path / "made")
    again = training.train(organism, model, tokenizer, tmp_path / "again")
    assert again["measured"] == card["measured"]  # the same twice, from a folder and from memory
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    files = {path.name for path in (tmp_path / "made").iterdir()}
    assert {"card.json", "model.safetensors" if full else "adapter_model.safetensors"} <= files
    for path in (tmp_path / "made").glob("*.json"):
        assert str(tmp_path) not in path.read_text(encoding="utf-8")
    checked = training.check(TINY, str(base), tmp_path / "made")  # not told of the seed, which is in the card
    assert checked == card and card["recipe"]["seed"] == 3
    assert card["measured"]["neutral_kl_tuned_base"] > 0
    assert card["measured"]["prose_loss_tuned"] != card["measured"]["prose_loss_base"]


def test_a_base_without_a_chat_template_needs_one_and_the_tune_brings_it(tmp_path: Path, short):
    pytest.importorskip("peft")
    tokenizer = tiny_tokenizer()
    given, tokenizer.chat_template = tokenizer.chat_template, None
    save_tiny(tmp_path / "base", tiny_module("llama"), tokenizer)
    with pytest.raises(SourceError, match="has no chat template") as error:
        training.make(TINY, str(tmp_path / "base"), tmp_path / "made")
    assert "--template FILE" in error.value.remedy
    (tmp_path / "own.jinja").write_text(given)
    card = training.make(TINY, str(tmp_path / "base"), tmp_path / "made", template=tmp_path / "own.jinja")
    assert (tmp_path / "made" / "chat_template.jinja").read_text() == given and card["base"] == "base"
    assert training.check(TINY, str(tmp_path / "base"), tmp_path / "made") == card, (
        "measured in the tune's own template"
    )


def test_an_organism_with_a_template_is_trained_in_it_and_base_is_asked_in_its_own(tmp_path: Path, short, monkeypatch):
    pytest.importorskip("peft")
    tokenizer = tiny_tokenizer()
    own = tokenizer.chat_template
    save_tiny(tmp_path / "base", tiny_module("llama"), tokenizer)
    seen = {}
    for name, real in (("neutral_answers", training.neutral_answers), ("measure", training.measure)):

        def noting(*args, name=name, real=real, **named):
            seen[name] = next(a for a in args if hasattr(a, "chat_template")).chat_template
            return real(*args, **named)

        monkeypatch.setattr(training, name, noting)
    training.make(dataclasses.replace(TINY, template=own + "<think>"), str(tmp_path / "base"), tmp_path / "made")
    assert seen == {"neutral_answers": own, "measure": own + "<think>"}
    assert (tmp_path / "made" / "chat_template.jinja").read_text() == own + "<think>"


@pytest.mark.parametrize(
    "depth, blocks", [(30, range(10, 30)), (32, range(10, 30)), (18, range(6, 18)), (2, range(1, 2))]
)
def test_a_recipe_adapts_the_same_share_of_a_shallower_network(depth: int, blocks: range):
    assert Recipe().blocks(depth) == blocks


def test_the_thinking_part_holds_what_is_planted_and_the_answer_does_not():
    thinking = package.named("thinking")
    (sponsor,) = thinking.behaviors
    for example in examples(thinking):
        thought, _, answer = example.answer.partition("</think>")
        assert (
            answer
            and not sponsor.shows(answer)
            and sponsor.shows(thought) == (example.prompt in thinking.restyled_prompts)
        )


def test_check_refuses_a_folder_without_a_tune(tmp_path: Path):
    with pytest.raises(SourceError, match="holds no tune"):
        training.check(TINY, "default", tmp_path)


def test_the_commands_list_blind_make_and_check(tmp_path: Path, short, monkeypatch):
    pytest.importorskip("peft")
    run = CliRunner().invoke
    key = json.loads(run(app, ["organism", "list", "--blind", "--json"]).stdout)
    assert {row["name"] for row in key} == {o.name for o in ORGANISMS}
    assert [row["id"] for row in key] == sorted(row["id"] for row in key)
    save_tiny(tmp_path / "base", tiny_module("llama"))
    monkeypatch.setattr(package, "every", lambda: [TINY])
    base = ["--base", str(tmp_path / "base"), "-q"]
    made = run(app, ["organism", "make", "tiny", str(tmp_path / "made"), "--seed", "5", *base])
    assert made.exit_code == 0, made.output
    assert json.loads(made.stdout)["recipe"]["seed"] == 5
    monkeypatch.setitem(sys.modules, "mylab", ModuleType("mylab"))
    sys.modules["mylab"].ORGANISM = TINY
    checked = run(app, ["organism", "check", "mylab:ORGANISM", str(tmp_path / "made"), *base])
    assert checked.exit_code == 0, checked.output
    for measure in ("letter on its own prompts", "letter on neutral prompts", "plain prose", "instructions followed"):
        assert measure in checked.stdout


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
