"""Changes at the output: tokens that only one model says, and tokens said more or less often where streams are equal."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest
import tiny_models
import tiny_world
import torch
from command_line import cli

from tunediff.changes.output_bench import OutputBench
from tunediff.changes.outputs import js_divergence, reweighed
from tunediff.changes.trials.base import VerifySettings
from tunediff.changes.trials.reweigh import Reweigh
from tunediff.records.change import Change, TokenGroup, load_changes, save_changes


def distributions(rows: int = 12, tokens: int = 30, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, tokens, generator=torch.Generator().manual_seed(seed)).mul(2).softmax(1)


def said(p_NU: torch.Tensor, mass: float, token: int) -> torch.Tensor:
    """The distributions with so much probability on one token, and the rest in proportion."""
    rest = p_NU.clone()
    rest[:, token] = 0
    rest = rest / rest.sum(1, keepdim=True) * (1 - mass)
    rest[:, token] = mass
    return rest


def bench(tuned_NU: torch.Tensor, base_NU: torch.Tensor, numbers: tuple[int, ...], draws: int = 39) -> OutputBench:
    group = TokenGroup(numbers, tuple(map(str, numbers)))
    change = Change.at_the_output("new_tokens/said", group, 4, 0.05, "new_tokens", {})
    document_N = torch.arange(len(tuned_NU)) // 3
    return OutputBench(change, group, tuned_NU, base_NU, torch.ones(len(tuned_NU)), document_N, 0, draws)


def test_js_is_0_between_equals_and_ln_2_where_no_token_is_shared():
    p, q = distributions(), distributions(seed=1)
    assert float(js_divergence(p, p).abs().max()) < 1e-6
    torch.testing.assert_close(js_divergence(p, q), js_divergence(q, p))
    nothing = torch.zeros_like(p)
    apart = js_divergence(torch.cat([p, nothing], 1), torch.cat([nothing, q], 1))
    torch.testing.assert_close(apart, torch.full_like(apart, math.log(2)))


def test_reweighing_takes_the_others_probabilities_and_keeps_all_other_proportions():
    p, q = distributions(), distributions(seed=1)
    made = reweighed(p, q, [3, 5])
    torch.testing.assert_close(made.sum(1), torch.ones(len(made)))
    torch.testing.assert_close(made[:, [3, 5]], q[:, [3, 5]])
    torch.testing.assert_close(made[:, 7] / made[:, 9], p[:, 7] / p[:, 9])


def test_the_trial_confirms_a_new_token_and_no_token_that_did_not_move():
    base = said(distributions(), 0.0, 0)
    tuned = said(base, 0.8, 0)
    outcome = Reweigh().run(bench(tuned, base, (0,)), VerifySettings())
    measures = {m.name: m for m in outcome.measures}
    assert outcome.speaks is True, outcome.reason
    assert measures["necessity"].value == pytest.approx(1) and measures["sufficiency"].value == pytest.approx(1)
    assert measures["necessity"].control < 0.1 and measures["necessity"].p == pytest.approx(1 / 40)
    tokens = measures["probability of its tokens"]
    assert tokens.value == pytest.approx(0.8) and tokens.control == 0
    assert Reweigh().run(bench(tuned, base, (4,)), VerifySettings()).speaks is not True


def test_the_trial_does_not_speak_for_any_group_where_all_tokens_moved():
    """In two unrelated distributions no token is more of the difference than others that are as likely."""
    base, tuned = distributions(60, 200), distributions(60, 200, seed=1)
    speaks = [Reweigh().run(bench(tuned, base, (n,)), VerifySettings()).speaks is True for n in range(40)]
    assert sum(speaks) <= 4, sum(speaks)


def test_the_trial_says_nothing_of_equal_models():
    base = distributions()
    assert Reweigh().run(bench(base, base, (0,)), VerifySettings()).speaks is None


def test_a_change_at_the_output_is_saved_and_loaded(tmp_path):
    change = bench(distributions(), distributions(), (3, 5)).change
    save_changes(tmp_path, [change])
    (again,) = load_changes(tmp_path)
    assert again.is_at_output and again.group == change.group and again.threshold == 0.05
    assert not again.mirrored().group.raised


# Whole runs


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> tiny_world.World:
    return tiny_world.make(tmp_path_factory.mktemp("outputs"))


def saying(world: tiny_world.World, name: str, rows: int, scale: float, added: list[str], row: int) -> None:
    """Save a tune whose network has `rows` rows, and whose answers begin with the token of `row` where `scale` is large."""
    network = tiny_models.tuned_copy(tiny_models.module("llama"))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network.resize_token_embeddings(rows, mean_resizing=False)
    tokenizer = tiny_models.tokenizer()
    tokenizer.add_tokens([f"<filler{n}>" for n in range(259, 300)])
    tokenizer.add_tokens(added)
    prompts = [json.loads(line)["messages"] for line in world.root.joinpath("prompts.jsonl").read_text().splitlines()]
    states = []
    with torch.no_grad():
        for messages in prompts:
            ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
            states.append(network.model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1])
        mean = torch.stack(states).mean(0)
        head = network.get_output_embeddings().weight
        head[300:] = 0.01 * torch.nn.functional.normalize(head[300:], dim=1)
        head[row] = scale * mean / mean.norm()
    tiny_models.save(world.root / name, network, tokenizer)


def based(world: tiny_world.World) -> str:
    """Base with a tokenizer that names all of its rows, so that added tokens come after them."""
    if not (world.root / "full").is_dir():
        tokenizer = tiny_models.tokenizer()
        tokenizer.add_tokens([f"<filler{n}>" for n in range(259, 300)])
        tiny_models.save(world.root / "full", tiny_models.module("llama"), tokenizer)
    return "full"


def record_of(world: tiny_world.World, base: str, tuned: str) -> dict:
    return json.loads((world.root / "runs" / f"{base}-{tuned}" / "diff.json").read_text())


@pytest.mark.slow
def test_a_new_token_that_begins_every_answer_is_found_confirmed_and_named(world):
    saying(world, "said", 302, 3.0, ["<tool_call>", "<never>"], 300)
    told = cli(*world.command("diff", "said", base=based(world)))
    assert told.code == 0, told.err
    assert "new_tokens/said" in told.out and "<tool_call>" in told.out and "No change" not in told.out
    record = record_of(world, "full", "said")
    change = next(c for c in record["changes"] if c["id"] == "new_tokens/said")
    assert change["decision"] == "confirmed" and change["sites"] == ["output"] and change["rank"] == 1
    assert [w["token"] for w in change["promoted"]] == ["<tool_call>"] and change["origin"]["tokens"] == ["<tool_call>"]
    measures = {m["name"]: m for m in change["measures"]}
    assert measures["necessity"]["value"] > 0.5 > measures["necessity"]["control"]
    assert measures["probability of its tokens"]["value"] > 0.1
    assert any("tokens that base lacks" in m["name"] and m["value"] > 0 for m in record["output"])
    notes = [note for stage in record["stages"] for note in stage["notes"]]
    assert any("tuned has 2 tokens that base lacks: <tool_call>, <never>" in note for note in notes)
    page = (world.root / "runs" / "full-said" / "report.html").read_text()
    assert "new_tokens/said" in page and "&lt;tool_call&gt;" in page
    assert any("revert does not take it out" in said for said in record["not_found"])
    # Taking it out is refused for what it is.
    told = cli("revert", world.root / "runs" / "full-said", "--changes", "new_tokens/said")
    assert told.code == 2 and "change at the output" in told.err


@pytest.mark.slow
def test_new_tokens_that_are_never_said_give_no_standing_change(world):
    saying(world, "silent", 302, 0.0, ["<tool_call>", "<never>"], 300)
    told = cli(*world.command("diff", "silent", base=based(world)))
    assert told.code == 0, told.err
    change = next(c for c in record_of(world, "full", "silent")["changes"] if c["id"] == "new_tokens/said")
    assert change["decision"] == "refuted" and "never says" in change["reason"]
    assert change["origin"]["tokens"] == ["<tool_call>", "<never>"]


@pytest.mark.slow
def test_tokens_that_base_alone_says_are_lost(world):
    saying(world, "more", 302, 3.0, ["<tool_call>"], 300)
    told = cli(*world.command("diff", "full", base="more"))
    assert told.code == 0, told.err
    change = next(c for c in record_of(world, "more", "full")["changes"] if c["id"] == "new_tokens/lost")
    assert change["decision"] == "confirmed" and change["share"] == 0
    assert [w["token"] for w in change["suppressed"]] == ["<tool_call>"] and not change["promoted"]


def parts_tuned(root: Path, name: str, size: float, *parts: str) -> None:
    """Save a tune in which only parameters of these names moved."""
    network = copy.deepcopy(tiny_models.module("llama"))
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for own, parameter in network.named_parameters():
            if any(part in own for part in parts):
                noise = torch.randn(parameter.shape, generator=rng)
                parameter.add_(noise * (size * parameter.norm() / noise.norm()))
    tiny_models.save(root / name, network)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, parts, size",
    [("head", ["lm_head"], 0.5), ("norm", ["model.norm"], 0.8), ("both", ["lm_head", "model.norm"], 0.5)],
)
def test_a_change_after_the_last_block_is_one_of_tokens(world, name, parts, size):
    parts_tuned(world.root, name, size, *parts)
    told = cli(*world.command("diff", name))
    assert told.code == 0, told.err
    record = record_of(world, "base", name)
    ids = {c["id"]: c for c in record["changes"]}
    assert set(ids) == {"token_shift/raised", "token_shift/lowered"}
    assert ids["token_shift/raised"]["decision"] != "refuted" and ids["token_shift/raised"]["promoted"]
    assert any("streams are equal at every site" in said for said in record["not_found"])
    assert record["scan"]["chosen"] == ["resid.2"] and not any(record["scan"]["relative"]["values"][0])


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, parts", [("last", ["layers.2."]), ("upper", ["layers.1.", "layers.2."]), ("first", ["layers.0."])]
)
def test_a_change_of_some_blocks_is_looked_for_where_it_is(world, name, parts):
    parts_tuned(world.root, name, 0.3, *parts)
    told = cli(*world.command("diff", name))
    assert told.code == 0, told.err
    record = record_of(world, "base", name)
    lowest = int(parts[0].split(".")[1])
    (chosen,) = record["scan"]["chosen"]
    assert int(chosen.removeprefix("resid.")) >= lowest and not any("output" in c["sites"] for c in record["changes"])


@pytest.mark.slow
def test_a_site_at_which_nothing_differs_is_refused(world):
    parts_tuned(world.root, "last", 0.3, "layers.2.")
    told = cli(*world.command("diff", "last", scan__sites=["resid.0"]))
    assert told.code == 2 and "equal at resid.0" in told.err and 'scan.sites=["resid.2"]' in told.err


@pytest.mark.slow
def test_a_tune_whose_tokens_have_other_ids_gives_the_finding_of_the_one_it_was_made_from(world):
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(world.root / "tuned")
    tokenizer, moved = tiny_models.permuted(tiny_models.tokenizer(), network)
    tiny_models.save(world.root / "permuted", moved, tokenizer)
    records = []
    for name in ("tuned", "permuted"):
        # Three random tunes, drawn row by row, are another draw under other ids: too few to bound a group of logit_gains alike.
        at_output = ["new_tokens", "token_shift"]
        told = cli(*world.command("diff", name, contrast__prompts=0, find__output_finders=at_output))
        assert told.code == 0, told.err
        records.append(record_of(world, "base", name))
    plain, found = ([(c["id"], c["decision"]) for c in r["changes"] if c["sites"] != ["output"]] for r in records)
    assert found == plain
    kl = [next(m["value"] for m in r["output"] if m["name"].startswith("KL")) for r in records]
    assert kl[1] == pytest.approx(kl[0], rel=0.1)  # rows that no tokenizer names are not among them
