"""Runs with variants of one's own: no stale results, the same evidence under another name, and no code unasked."""

from __future__ import annotations

import importlib
import shutil
import sys
import textwrap
from pathlib import Path

import pytest
import tiny_world
from command_line import cli
from tiny_world import World

import tunediff
from tunediff.runs.plan import Plan, from_record, to_record
from tunediff.runs.run import Run

pytestmark = pytest.mark.slow

OFFSET = """
    from dataclasses import dataclass, replace
    from tunediff.changes.finders.base import Found
    from tunediff.changes.finders.mean_difference import MeanDifference

    @dataclass(frozen=True)
    class Mine(MeanDifference):
        times: float = 1.0

        def find(self, view):
            found = super().find(view).changes
            return Found([replace(c, write_SMD=c.write_SMD * self.times * {size}) for c in found])
"""
ALIAS = "from tunediff.changes.finders.crosscode import Crosscode as Mine\n"
TRIAL = """
    from tunediff.changes.trials.base import Outcome, Trial
    from tunediff.records.measure import Measure

    class Always(Trial):
        decides = True

        def run(self, bench, settings):
            return Outcome([Measure("always", 1.0)], True, "it always says so")
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return tiny_world.make(tmp_path_factory.mktemp("world"))


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write a module of one's own, which is then imported anew."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def put(text: str, name: str = "runlab") -> None:
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(text))
        sys.modules.pop(name, None)
        importlib.invalidate_caches()

    yield put
    sys.modules.pop("runlab", None)


def planned(world: World, **settings: object) -> Plan:
    values = to_record(Plan(base=str(world.root / "base"), tuned=str(world.root / "tuned")))
    for part, fields in {**tiny_world.parts(world), **settings}.items():
        values[part] = {**values[part], **tiny_world.parts(world).get(part, {}), **fields}
    return from_record(values)


def sizes(world: World, folder: Path, **find: object) -> list[float]:
    changes = Run(planned(world, find={"finders": ["runlab:Mine"], **find}), folder).changes
    return [round(float(c.difference_SD.norm()), 4) for c in changes]


def test_an_edited_finder_is_not_answered_by_yesterdays_result(world, write, tmp_path):
    write(OFFSET.format(size=1))
    first = sizes(world, tmp_path / "run")
    write(OFFSET.format(size=3))
    edited = sizes(world, tmp_path / "run")
    assert edited == pytest.approx([3 * size for size in first], abs=1e-3)
    write(OFFSET.format(size=1))
    assert sizes(world, tmp_path / "run") == first
    assert len(list((tmp_path / "run" / "find").iterdir())) == 2, "the first result was opened, not made again"


def test_a_finders_setting_reaches_it_and_its_key(world, write, tmp_path):
    write(OFFSET.format(size=1))
    first = sizes(world, tmp_path / "run")
    twice = sizes(world, tmp_path / "run", **{"runlab:Mine": {"times": 2.0}})
    assert twice == pytest.approx([2 * size for size in first], abs=1e-3)


def test_the_same_finder_under_another_name_has_the_same_evidence(world, write, tmp_path):
    write(ALIAS)
    runs = [
        Run(planned(world, find={"finders": [name, "mean_difference"]}), tmp_path / "run")
        for name in ("crosscode", "runlab:Mine")
    ]
    ours, theirs = (run.verdicts for run in runs)
    assert ours == theirs
    scaled = [r for r in theirs if any(m.name.startswith("Latent Scaling") for m in r.measures)]
    assert len(scaled) == sum("latent" in r.origin for r in theirs) > 0


def test_two_names_of_one_finder_in_one_run_have_ids_of_their_own(world, write, tmp_path):
    write(ALIAS)
    run = Run(planned(world, find={"finders": ["crosscode", "runlab:Mine"]}), tmp_path / "run")
    ids = [c.id for c in run.changes]
    assert len(set(ids)) == len(ids) and {id.split("/")[0] for id in ids} == {"crosscode", "runlab.Mine"}


def test_trials_are_chosen_and_say_whether_they_decide(world, write, tmp_path):
    write(TRIAL)
    by = {}
    for trials in (["steer"], ["steer", "runlab:Always"], ["patch", "steer"]):
        run = Run(planned(world, verify={"trials": trials}, find={"output_finders": []}), tmp_path / "run")
        by[trials[-1]] = [r for r in run.verdicts if "not put on trial" not in r.reason and r.decision != "refuted"]
    assert by["steer"] and all(r.decision == "confirmed" for r in by["runlab:Always"])
    steered = Run(planned(world, verify={"trials": ["steer"]}, find={"output_finders": []}), tmp_path / "run").verdicts
    tried = [r for r in steered if r.dose]
    assert tried and all(r.decision == "undecided" and "none of the trials decides" in r.reason for r in tried)
    assert not any(m.name == "necessity" for r in steered for m in r.measures)


def test_a_run_whose_plan_names_code_is_opened_only_with_leave(world, write, tmp_path):
    write(OFFSET.format(size=1))
    sets = [*world.sets(), "--set", 'find.finders=["runlab:Mine"]']
    command = ["find", world.root / "base", world.root / "tuned", "--runs", tmp_path / "runs", *sets]
    assert cli(*command).code == 0
    revert = ["revert", "base-tuned", "--runs", tmp_path / "runs"]
    refused = cli(*revert)
    assert refused.code == 2 and "runlab:Mine" in refused.err and "--allow-code" in refused.err
    allowed = cli(*revert, "--allow-code")
    assert "names code" not in allowed.err
    plan = tmp_path / "plan.toml"
    shutil.copy(tmp_path / "runs" / "base-tuned" / "plan.toml", plan)
    fresh = ["find", world.root / "base", world.root / "tuned", "--runs", tmp_path / "fresh", "--plan", plan]
    assert cli(*fresh).code == 2 and cli(*fresh, "--allow-code").code == 0
    with pytest.raises(tunediff.TunediffError, match="names code"):
        tunediff.revert(tmp_path / "runs" / "base-tuned")


FAMILY = """
    from tunediff.models.families.huggingface import HuggingFace

    class Named(HuggingFace):
        asked = 0

        def matches(self, module):
            Named.asked += 1
            return type(module).__name__ == "{network}"
"""


def test_a_family_of_ones_own_reads_both_networks(world, write, tmp_path):
    write(FAMILY.format(network="LlamaForCausalLM"))
    run = Run(planned(world, pair={"family": "runlab:Named"}), tmp_path / "run")
    plain = Run(planned(world), tmp_path / "run")
    assert type(run.pair.base.family).__name__ == type(run.pair.tuned.family).__name__ == "Named"
    assert run.scan == plain.scan
    assert len(list((tmp_path / "run" / "scan").iterdir())) == 2, "who reads the networks is in the key"


def test_a_family_that_does_not_know_the_network_is_refused(world, write, tmp_path):
    write(FAMILY.format(network="OtherForCausalLM"))
    with pytest.raises(tunediff.TunediffError, match="does not know LlamaForCausalLM"):
        Run(planned(world, pair={"family": "runlab:Named"}), tmp_path / "run").pair
