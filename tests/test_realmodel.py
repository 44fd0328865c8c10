"""The main job on real models: the embedded base, its shipped tune, and nulls."""

from __future__ import annotations

import pytest

from tunediff import organisms
from tunediff.demo import check
from tunediff.plans import Plan
from tunediff.stages import DEMO, Run

pytestmark = [pytest.mark.realmodel, pytest.mark.slow]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    """The demo's run, with its own settings."""
    return Run(Plan(base="default", tuned="demo"), tmp_path_factory.mktemp("runs") / "demo")


def test_each_objective_is_named_and_the_hidden_one_comes_out_alone(run):
    checked = check(run)
    assert all(checked.named.values()), checked.text
    assert checked.bills, checked.text
    bill = run.diff(checked.bills).bills[0]
    assert bill.changes


def test_a_random_tune_of_the_same_size_confirms_nothing(run, tmp_path):
    from tunediff.pairs import Pair

    null = Run(run.plan, tmp_path / "null")
    pair = Pair.load("default", str(DEMO))
    pair.tuned = pair.random_tuned(12345)
    null.__dict__["pair"] = pair
    null.__dict__["contrast"] = run.contrast
    assert not [r for r in null.verdicts if r.decision == "confirmed"]


def test_base_against_itself_confirms_nothing(tmp_path):
    plan = Plan(base="default", tuned="default").set("pair.allow_identical=true").set("contrast.prompts=24")
    assert not [r for r in Run(plan, tmp_path / "same").verdicts if r.decision == "confirmed"]


def test_the_demo_organism_is_the_one_that_ships():
    assert organisms.named("two-objectives").base == "SmolLM2-135M-Instruct"
