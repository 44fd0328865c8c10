"""tunediff from Python: the same run as the command line's, models in memory, and nothing touched before a verb runs."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import tiny_models
import tiny_world
import torch
from tiny_world import World

import tunediff
from tunediff.core.errors import ArtifactError, PairError, SettingError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return tiny_world.make(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def found(world) -> tunediff.Diff:
    return tunediff.diff(world.root / "base", world.root / "tuned", runs=world.root / "runs", **tiny_world.parts(world))


def test_a_diff_holds_the_record_and_its_run(world, found):
    folder = world.root / "runs" / "base-tuned"
    assert found.confirmed and found.run.folder == folder
    assert tunediff.Diff.load(folder / "diff.json") == found
    assert (folder / "report.html").is_file() and tunediff.report(folder) == folder / "report.html"


def test_it_is_the_command_lines_run(world, found):
    """The same settings on the command line find every stage finished."""
    command = [sys.executable, "-m", "tunediff", *map(str, world.command("diff")), "--quiet"]
    before = sorted(p for p in (world.root / "runs").rglob("manifest.json"))
    stamps = [p.stat().st_mtime_ns for p in before]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert sorted(p for p in (world.root / "runs").rglob("manifest.json")) == before
    assert [p.stat().st_mtime_ns for p in before] == stamps


def test_an_edit_and_its_bill(found):
    id = found.confirmed[0].id
    edit = found.edit([id])
    edited = edit.applied(found.run.pair.tuned)
    ids_BT = torch.arange(20)[None] + 5
    with torch.inference_mode():
        gap = (edited.states(ids_BT) - found.run.pair.tuned.states(ids_BT)).abs().max()
    assert float(gap) > 0 and edit.changes == (id,)
    assert tunediff.revert(found, [id]) == found.bill([id])
    assert found.findings and {*found.findings[0].members} <= {change.id for change in found.confirmed}
    with pytest.raises(SettingError, match="no finding 99"):
        tunediff.revert(found, finding=99)


def test_a_record_from_a_file_has_no_run(world, found):
    loaded = tunediff.Diff.load(world.root / "runs" / "base-tuned" / "diff.json")
    with pytest.raises(ArtifactError, match="without its run"):
        loaded.edit()


def test_models_in_memory_give_the_same_changes_and_stay_as_they_were(world, found, tmp_path):
    from transformers import AutoModelForCausalLM

    sides = [AutoModelForCausalLM.from_pretrained(world.root / side).train() for side in ("base", "tuned")]
    sides[0].model.layers[0].eval()
    modes = [[m.training for m in side.modules()] for side in sides]
    states = [copy.deepcopy(side.state_dict()) for side in sides]
    tokenizer = tiny_models.tokenizer()
    given = tunediff.diff(
        (sides[0], tokenizer), (sides[1], tokenizer), run="given", runs=tmp_path, **tiny_world.parts(world)
    )
    assert [(c.id, c.decision, c.score) for c in given.changes] == [(c.id, c.decision, c.score) for c in found.changes]
    seen: list[bool] = []
    handle = sides[1].model.layers[0].register_forward_pre_hook(lambda module, _: seen.append(module.training))
    given.edit([given.changes[-1].id])
    handle.remove()
    assert seen and not any(seen), "an edit that is made later reads the model in evaluation mode, too"
    assert modes == [[m.training for m in side.modules()] for side in sides]
    for side, state in zip(sides, states):
        assert all(torch.equal(value, state[name]) for name, value in side.state_dict().items())


def test_a_notebook_shows_a_summary_with_every_string_escaped(found):
    from dataclasses import replace

    hostile = replace(found.changes[0], id="<script>alert(1)</script>")
    html = tunediff.Diff.of(found.run, replace(found, changes=[hostile]))._repr_html_()
    assert "<script>" not in html and "&lt;script&gt;" in html and found.base.name in html


@pytest.mark.parametrize(
    "settings, what",
    [({"verfy": {"draws": 3}}, "verfy"), ({"verify": {"drws": 3}}, "verify.drws"), ({"seed": "x"}, "seed")],
)
def test_settings_that_do_not_exist_are_refused(world, settings, what):
    with pytest.raises(SettingError, match=what):
        tunediff.diff(world.root / "base", world.root / "tuned", **settings)


@pytest.mark.parametrize("model", [3, tiny_models.module("llama"), ("a", "b")])
def test_what_is_no_model_is_refused(world, model):
    with pytest.raises(PairError, match="no model"):
        tunediff.diff(model, world.root / "tuned")


def test_code_in_a_plan_file_is_refused_and_the_callers_own_is_not(world, tmp_path):
    plan = tmp_path / "plan.toml"
    plan.write_text('[find]\nfinders = ["evil.module:Finder"]\n')
    with pytest.raises(SettingError, match="code of its own"):
        tunediff.diff(world.root / "base", world.root / "tuned", plan=plan)
    with pytest.raises(tunediff.TunediffError, match="cannot be imported"):
        tunediff.diff(world.root / "base", world.root / "tuned", find={"finders": ["evil.module:Finder"]})


def test_importing_costs_nothing_and_every_public_name_is_there():
    code = (
        "import sys, tunediff\n"
        "print([m for m in ('torch', 'numpy', 'transformers', 'typer') if m in sys.modules])\n"
        "import tunediff.api, torch\n"
        "print(all(hasattr(tunediff, name) for name in tunediff.__all__), set(tunediff.__all__) <= set(dir(tunediff)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == ["[]", "True True"], done.stderr


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="nothing_of_that_name"):
        tunediff.nothing_of_that_name
