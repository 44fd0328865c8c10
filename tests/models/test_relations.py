"""Relations: what tuned is to base is read off weights, told in numbers, and a tuned model of another ancestor is refused."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import tiny_models
import tiny_world
import torch
from command_line import cli

from tunediff.core.errors import PairError
from tunediff.models.fingerprints import fingerprint, function_of, speech_fingerprint
from tunediff.models.network import LanguageModel
from tunediff.models.pair import Pair
from tunediff.models.relations import relation
from tunediff.records.diff import Diff

TOKENIZER = tiny_models.tokenizer()


def model(network) -> LanguageModel:
    return LanguageModel(network, TOKENIZER, "model")


def measured(base, tuned):
    return relation(model(base), model(tuned), False, [])


def moved(network, change):
    """A copy in which `change(name, weight)` was added to every matrix of the blocks."""
    other = copy.deepcopy(network)
    with torch.no_grad():
        for name, parameter in other.model.layers.named_parameters():
            if parameter.dim() == 2:
                parameter.add_(change(name, parameter))
    return other


def low_rank(rank: int, size: float):
    rng = torch.Generator().manual_seed(0)

    def change(name, weight):
        made = torch.randn(len(weight), rank, generator=rng) @ torch.randn(rank, weight.shape[1], generator=rng)
        return made * (size * weight.norm() / made.norm())

    return change


def test_each_kind_is_told_with_its_numbers():
    base = tiny_models.module("llama")
    kinds = {
        "same weights": copy.deepcopy(base),
        "rounded copy": copy.deepcopy(base).bfloat16().float(),
        "merged adapter": moved(base, low_rank(4, 0.05)),
        "light tune": tiny_models.tuned_copy(base, 0.02),
        "heavy tune": tiny_models.tuned_copy(base, 0.5),
        "other ancestor": tiny_models.module("llama", seed=9),
        "unrelated": tiny_models.module("gpt2"),
    }
    found = {kind: measured(base, tuned) for kind, tuned in kinds.items()}
    assert {kind: one.kind for kind, one in found.items()} == {kind: kind for kind in kinds}
    assert found["same weights"].equal == 1 and found["same weights"].distance == 0
    assert 0 < found["rounded copy"].distance < 0.004 and 0 < found["rounded copy"].equal < 0.1
    assert found["merged adapter"].rank == 4 and found["merged adapter"].changed == 21
    assert found["light tune"].rank is None and found["light tune"].distance == pytest.approx(0.0135, rel=0.1)
    assert found["heavy tune"].cosine == pytest.approx((1 + 0.5**2) ** -0.5, abs=0.02)
    assert abs(found["other ancestor"].cosine) < 0.03 and found["other ancestor"].is_foreign
    assert found["unrelated"].compared == 0 and found["unrelated"].only_base == 30


def test_rounding_the_other_way_and_to_half_precision_are_rounded_copies():
    base = tiny_models.module("llama")
    assert measured(copy.deepcopy(base).bfloat16().float(), base).kind == "rounded copy"
    assert measured(base, copy.deepcopy(base).half().float()).kind == "rounded copy"
    tuned = copy.deepcopy(base).bfloat16().float()
    tuned.model.layers[1].mlp.up_proj.weight.data[0, 0] += 1
    assert measured(base, tuned).kind != "rounded copy"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merged_adapter_is_told_in_either_precision(dtype):
    base = tiny_models.module("llama").to(dtype)
    found = measured(base, moved(base, low_rank(3, 0.1)))
    assert (found.kind, found.rank) == ("merged adapter", 3)


def test_shuffled_units_are_another_ancestor_by_place():
    base = tiny_models.module("llama")
    order = torch.randperm(32, generator=torch.Generator().manual_seed(0))

    def shuffled(weight):
        weight = weight[order] if len(weight) == 32 else weight
        return weight[:, order] if weight.shape[-1] == 32 else weight

    tuned = copy.deepcopy(base)
    for parameter in tuned.parameters():
        if parameter.dim() == 2:
            parameter.data = shuffled(parameter.data).contiguous()
    assert measured(base, tuned).kind == "other ancestor"


def test_added_rows_are_left_out_of_the_comparison():
    base = tiny_models.module("llama")
    tuned = tiny_models.tuned_copy(base, 0.02)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tuned.resize_token_embeddings(310, mean_resizing=False)
    found = measured(base, tuned)
    assert (found.kind, found.only_base, found.only_tuned) == ("light tune", 0, 0)


def test_a_model_of_another_ancestor_is_refused_unless_allowed(tmp_path):
    base = tiny_models.save(tmp_path / "base", tiny_models.module("llama"))
    other = tiny_models.save(tmp_path / "other", tiny_models.module("llama", seed=9))
    with pytest.raises(PairError, match="do not come from") as caught:
        Pair.load(base, other)
    assert "other ancestor" in caught.value.got and "--set pair.allow_unrelated=true" in caught.value.remedy
    assert Pair.load(base, other, allow_unrelated=True).relation.is_foreign


def test_an_adapter_is_told_with_its_rank_and_size(tmp_path):
    network = tiny_models.module("llama")
    base = tiny_models.save(tmp_path / "base", network)
    pair = Pair.load(base, tiny_models.adapter(tmp_path / "lora", network))
    found = pair.relation
    assert (found.kind, found.rank, found.changed, found.compared) == ("adapter", 4, 21, 30)
    size = sum(d.norm**2 for d in pair.deltas()) / sum(float(p.detach().norm()) ** 2 for p in network.parameters())
    assert found.distance == pytest.approx(size**0.5, rel=1e-4)
    adapted = sum(p.numel() for p in network.model.layers.parameters() if p.dim() == 2)
    assert found.equal == pytest.approx(1 - adapted / sum(p.numel() for p in network.parameters()), abs=0.01)


# The configuration is part of who a model is


def variant(source: Path, folder: Path, **fields) -> str:
    shutil.copytree(source, folder)
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
    return str(folder)


OTHER = {
    "rope_parameters.rope_theta": dict(rope_parameters={"rope_theta": 500.0, "rope_type": "default"}),
    "rope_parameters.factor": dict(rope_parameters={"rope_theta": 10000.0, "rope_type": "linear", "factor": 4.0}),
    "rms_norm_eps": dict(rms_norm_eps=0.5),
    "hidden_act": dict(hidden_act="gelu"),
}


@pytest.mark.parametrize("field", OTHER)
def test_equal_weights_with_another_configuration_are_two_models(tmp_path, field):
    base = tiny_models.save(tmp_path / "base", tiny_models.module("llama"))
    pair = Pair.load(base, variant(Path(base), tmp_path / "other", **OTHER[field]))
    assert pair.base_fingerprint != pair.tuned_fingerprint
    assert pair.relation.kind == "same weights" and field in {d.field for d in pair.relation.config}
    ids = torch.randint(3, 250, (2, 40), generator=torch.Generator().manual_seed(0))
    assert not torch.equal(*(side.logits(side.states(ids)) for side in (pair.base, pair.tuned)))


@pytest.mark.parametrize(
    "fields",
    [
        dict(_name_or_path="elsewhere", transformers_version="4.0.0", dtype="bfloat16"),
        dict(use_cache=False, attention_dropout=0.3, initializer_range=1.0),
        dict(eos_token_id=5, pad_token_id=4),
    ],
    ids=["names", "training", "tokens"],
)
def test_fields_that_change_no_logits_are_not_who_a_model_is(tmp_path, fields):
    base = tiny_models.save(tmp_path / "base", tiny_models.module("llama"))
    other = variant(Path(base), tmp_path / "other", **fields)
    with pytest.raises(PairError, match="base and tuned are the same model") as caught:
        Pair.load(base, other)
    assert caught.value.got == "equal logits on every probe text"
    pair = Pair.load(base, other, allow_identical=True)
    assert pair.base_fingerprint == pair.tuned_fingerprint and not pair.relation.config


def test_a_configuration_that_changes_no_logits_here_is_told_as_that(tmp_path):
    base = tiny_models.save(tmp_path / "base", tiny_models.module("llama"))
    with pytest.raises(PairError, match="differs from .* but no logits do"):
        Pair.load(base, variant(Path(base), tmp_path / "other", max_position_embeddings=4096))


def test_the_same_model_under_other_spellings_has_one_fingerprint(tmp_path, monkeypatch):
    network = tiny_models.module("llama")
    tiny_models.save(tmp_path / "base", network)
    tiny_models.save(tmp_path / "tuned", tiny_models.tuned_copy(network))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("base")
    names = ["base", "./base", "base/", str(tmp_path / "base"), "tuned/../base", "link"]
    pairs = [Pair.load(name, "tuned") for name in names]
    assert len({(p.base_fingerprint, p.tuned_fingerprint, *p.speech_fingerprints) for p in pairs}) == 1
    assert fingerprint(network) == pairs[0].base_fingerprint


def test_what_is_spoken_is_a_fingerprint_of_its_own():
    network = tiny_models.module("llama")
    before = speech_fingerprint(tiny_models.tokenizer(), network)
    assert speech_fingerprint(tiny_models.tokenizer(), network) == before
    padded = tiny_models.tokenizer()
    padded(["a", "abc"], padding=True, truncation=True, max_length=2)
    assert speech_fingerprint(padded, network) == before, "what a call set is no rule of the tokenizer"
    template, added, ends = tiny_models.tokenizer(), tiny_models.tokenizer(), copy.deepcopy(network)
    template.chat_template = "{{ messages }}"
    added.add_tokens(["<tool>"])
    ends.generation_config.eos_token_id = [2, 5]
    others = [
        speech_fingerprint(*one) for one in ((template, network), (added, network), (tiny_models.tokenizer(), ends))
    ]
    assert len({before, *others}) == 4


@pytest.mark.slow
def test_a_difference_of_configuration_is_in_record_report_and_terminal(tmp_path):
    world = tiny_world.make(tmp_path)
    variant(world.base, tmp_path / "tuned500", **OTHER["rope_parameters.rope_theta"])
    told = cli(*world.command("diff", "tuned500"), "--no-undo")
    assert told.code == 0, told.err
    diff = Diff.load(world.run("tuned500") / "diff.json")
    assert diff.relation.kind == "same weights" and diff.base.fingerprint != diff.tuned.fingerprint
    assert [(d.field, d.base, d.tuned) for d in diff.relation.config] == [
        ("rope_parameters.rope_theta", "10000.0", "500.0")
    ]
    page = (world.run("tuned500") / "report.html").read_text()
    for shown in (told.out, page):
        assert "rope_parameters.rope_theta 10000.0 in base, 500.0 in tuned" in " ".join(shown.split())


def test_absent_none_and_false_are_one():
    network = tiny_models.module("llama")
    before = function_of(network)
    network.config.novel = None
    network.config.other = False
    assert function_of(network) == before
    network.config.novel = 1
    assert function_of(network) != before
