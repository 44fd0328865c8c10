"""The command line's promises, on a tiny pair saved on disk: what is printed where, what is skipped, what is refused."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_world
import torch
from command_line import Told, cli, process
from tiny_world import World

from tunediff.core.artifacts import read_json
from tunediff.records.diff import Diff

VERBS = ("harvest", "find", "rank", "verify")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    from transformers.utils import logging

    logging.disable_progress_bar()  # a process of its own switches it off before the import
    return tiny_world.make(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def full(world) -> Told:
    """The whole job on the full fine-tune."""
    told = cli(*world.command("diff"))
    assert told.code == 0, told.err
    return told


@pytest.fixture(scope="module")
def lora(world) -> Told:
    """The whole job on the adapter, as JSON, asked whether there was a change."""
    told = cli(*world.command("diff", "adapter"), "--json", "--exit-code")
    assert told.code in (0, 1), told.err
    return told


def without_seconds(path: Path) -> dict:
    record = read_json(path)
    for stage in record["stages"]:
        stage["seconds"] = 0
    return record


def stamps(run: Path) -> dict[str, int]:
    """When each stage's files were written."""
    return {str(p.relative_to(run)): p.stat().st_mtime_ns for p in run.glob("*/*/**/*") if p.is_file()}


def bake(world: World, tuned: str, out: Path) -> tuple[Told, torch.Tensor, torch.Tensor]:
    """Bake all confirmed changes; the logits of the folder as transformers loads it, and of the live edit."""
    from transformers import AutoModelForCausalLM

    from tunediff.runs.plan import Plan
    from tunediff.runs.run import Run

    told = cli("revert", world.run(tuned), "--bake", out)
    assert told.code == 0, told.err
    run = Run(Plan.read(world.run(tuned) / "plan.toml"), world.run(tuned))
    edit, _ = run.edit([r.id for r in run.verdicts if r.decision == "confirmed"])
    ids = torch.arange(3, 83).view(2, 40)
    with torch.no_grad():
        baked = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()(input_ids=ids).logits
    live = edit.applied(run.pair.tuned)
    assert not torch.equal(run.pair.tuned.logits(run.pair.tuned.states(ids)), baked)
    return told, baked, live.logits(live.states(ids))


def test_an_edit_keeps_neutral_text_whatever_fires_there(world, full):
    """A change that is on everywhere: neutral rows are kept as tuned has them, so taking it out costs less there."""
    from dataclasses import replace

    from tunediff.edits import bills
    from tunediff.harvests.samples import Sample
    from tunediff.runs.plan import Plan
    from tunediff.runs.run import Run

    run = Run(Plan.read(world.run() / "plan.toml"), world.run())
    everywhere = replace(run.change(run.verdicts[0].id), threshold=-1e9)
    written, plain = (
        Sample.take(run.harvest, run.tokens, split="train", limit=1500, seed=0, kinds=kinds)
        for kinds in (run.written, run.plain)
    )
    held_out = Sample.take(run.harvest, run.tokens, split="held_out", limit=1500, seed=0, kinds=run.plain)
    assert plain.strength(everywhere).any() and not set(plain.rows) & set(written.rows)
    cost, removed = {}, {}
    for name, neutral in (("without", None), ("with", plain)):
        moments = bills.inputs(run.pair, [everywhere], written, neutral, run.plan.edit, 0)
        edit, _ = bills.removing(run.pair, [everywhere.id], moments, run.plan.edit, 0)
        (cost[name],) = bills.costs(run.pair, [edit], held_out)
        (removed[name],) = bills.costs(run.pair, [edit], run.sample)
    assert (
        cost["with"] < 0.7 * cost["without"] and cost["with"] / removed["with"] < cost["without"] / removed["without"]
    )


# -- the way through -----------------------------------------------------------------------------------------------


def test_diff_writes_record_report_and_plan(world, full):
    run = world.run()
    diff = Diff.load(run / "diff.json")
    assert diff.found and diff.confirmed and diff.changes[0].rank == 1
    assert [s.name for s in diff.stages][:6] == ["load", "corpus", "contrast", "text", "scan", "harvest"]
    assert diff.bills and diff.plan["seed"] == 0
    html = (run / "report.html").read_text(encoding="utf-8")
    assert html.lstrip().lower().startswith("<!doctype html") and diff.changes[0].id in html
    from tunediff.runs.plan import Plan

    assert Plan.read(run / "plan.toml").verify.draws == 5
    assert "confirmed" in full.out and str(run / "report.html") in full.out


def test_results_go_to_stdout_and_progress_to_stderr(full, lora):
    assert "rank" in full.err and "harvest" in full.err
    assert "Traceback" not in full.err + lora.err
    record = json.loads(lora.out)
    assert record["schema"] == "tunediff.diff/2"
    # Each stage says once that it is over.
    assert full.err.count("verify                         2 / 2") == 1


def test_exit_code_tells_whether_a_change_was_confirmed(lora):
    record = json.loads(lora.out)
    assert lora.code == int(record["found"])
    assert record["found"] == any(c["decision"] == "confirmed" for c in record["changes"])


def test_no_undo_leaves_the_bills_out(world, full):
    told = cli(*world.command("diff", runs="elsewhere", verify__changes=1), "--no-undo", "--json", "-q")
    assert told.code == 0 and json.loads(told.out)["bills"] == [] and told.err == ""


@pytest.mark.parametrize("verb", VERBS)
def test_each_stage_prints_a_table_and_json(world, full, verb):
    before = stamps(world.run())
    table, record = cli(*world.command(verb)), cli(*world.command(verb), "--json", "-q")
    rows = json.loads(record.out)
    assert table.code == record.code == 0 and record.err == ""
    lines = table.out.splitlines()
    assert len(lines) == len(rows) + 1 and set(lines[0].split()) == set(rows[0])
    assert stamps(world.run()) == before


def test_a_second_run_skips_what_is_finished(world, full):
    run = world.run()
    files, record, report = stamps(run), without_seconds(run / "diff.json"), (run / "report.html").read_bytes()
    again = cli(*world.command("diff"))
    assert again.code == 0 and "rank" not in again.err.replace(str(run), "")
    assert stamps(run) == files
    assert without_seconds(run / "diff.json") == record
    assert len((run / "report.html").read_bytes()) == pytest.approx(len(report), abs=200)


def test_a_changed_setting_starts_a_folder_beside_the_old_one(world, full):
    run = world.run()
    files = stamps(run)
    assert cli(*world.command("rank", rank__nulls=4), "-q").code == 0
    now = stamps(run)
    assert files.items() <= now.items()
    assert {path.split("/")[0] for path in now.keys() - files.keys()} == {"rank"}
    assert cli(*world.command("diff"), "-q").code == 0  # the plan in the folder is the last one that was run
    assert stamps(run) == now


def test_runtime_settings_are_in_no_key(world, full):
    before = stamps(world.run())
    assert cli(*world.command("verify", runtime__threads=1), "-q").code == 0
    assert stamps(world.run()) == before


def test_a_plan_file_does_what_set_does(world, full, tmp_path):
    before = stamps(world.run())
    told = cli(
        "rank", world.base, world.tuned, "--runs", world.runs, "--plan", world.run() / "plan.toml", "--json", "-q"
    )
    assert told.code == 0 and stamps(world.run()) == before


def test_base_against_itself_needs_to_be_asked_for_and_gives_no_change(world):
    told = cli(*world.command("diff", "base"))
    assert told.code == 2 and "pair.allow_identical=true" in told.err and told.out == ""
    told = cli(*world.command("diff", "base", pair__allow_identical=True), "--exit-code")
    assert told.code == 0, told.err
    assert "No change" in told.out and not Diff.load(world.run("base") / "diff.json").found


# -- undoing -------------------------------------------------------------------------------------------------------


def test_revert_prints_the_bill(world, full):
    told = cli("revert", world.run().name, "--runs", world.runs)
    assert told.code == 0 and {"removed", "kept", "cost"} <= {
        line.split()[0].strip(",") for line in told.out.splitlines()
    }
    first = Diff.load(world.run() / "diff.json").confirmed[0].id
    bill = json.loads(cli("revert", world.run(), "--changes", first, "--json", "-q").out)
    assert bill["changes"] == [first] and all(m["against"] for m in bill["measures"])


def test_revert_keeps_to_a_cost(world, full):
    """As strongly as the cost allows: a higher one takes more out; one that nothing keeps to is refused."""
    first = Diff.load(world.run() / "diff.json").confirmed[0].id

    def bill(*arguments) -> dict[str, float]:
        told = cli("revert", world.run(), "--changes", first, "--json", "-q", *arguments)
        assert told.code == 0, told.err
        return {m["name"]: m["value"] for m in json.loads(told.out)["measures"]}

    whole = bill("--cost", 1000)
    half = bill("--cost", whole["cost"] / 2)
    assert half["cost"] <= whole["cost"] / 2 and half["removed"] < whole["removed"]
    told = cli("revert", world.run(), "--changes", first, "--cost", 0, "-q")
    assert told.code == 2 and "0 nat" in told.err and "Traceback" not in told.err


@pytest.mark.parametrize("tuned", ["tuned", "adapter"])
def test_a_baked_folder_is_the_live_edit(world, full, lora, tuned, tmp_path):
    if not Diff.load(world.run(tuned) / "diff.json").found:
        pytest.skip("nothing was confirmed on this pair")
    told, baked, live = bake(world, tuned, tmp_path / "baked")
    assert (baked - live).abs().max() <= 1e-4 * live.abs().max()
    card = (tmp_path / "baked" / "README.md").read_text()
    assert "without" in card and "| removed |" in card
    assert not list((tmp_path / "baked").glob("*.bin")) and not (tmp_path / "baked" / "adapter_config.json").exists()
    assert str(tmp_path / "baked") in told.out


def test_bake_refuses_a_folder_that_is_not_empty(world, full, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    told = cli("revert", world.run(), "--bake", tmp_path)
    assert told.code == 2 and "not an empty folder" in told.err and os.listdir(tmp_path) == ["mine.txt"]


def test_a_folder_is_baked_whole_or_not_at_all(world, full, tmp_path, monkeypatch):
    import tunediff.edits.baking

    def full_disk(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(tunediff.edits.baking, "write_bytes", full_disk)
        told = cli("revert", world.run(), "--bake", tmp_path / "baked", "-q")
        four_lines(Told(told.code, told.out, told.err), "No space left")
    assert os.listdir(tmp_path) == []
    (tmp_path / "baked").mkdir()
    assert cli("revert", world.run(), "--bake", tmp_path / "baked", "-q").code == 0
    assert os.listdir(tmp_path) == ["baked"] and (tmp_path / "baked" / "model.safetensors").is_file()


def test_revert_takes_a_finding_by_its_number(world, full):
    found = Diff.load(world.run() / "diff.json").findings
    assert found and found[0].members
    bill = json.loads(cli("revert", world.run(), "--finding", 1, "--json", "-q").out)
    assert bill["changes"] and {*bill["changes"]} <= {*found[0].members}
    for number, told in ((len(found) + 1, f"1 to {len(found)}"), (-1, "no finding -1")):
        refused = cli("revert", world.run(), "--finding", number, "-q")
        assert refused.code == 2 and told in refused.err and "Traceback" not in refused.err
    both = cli("revert", world.run(), "--finding", 1, "--changes", bill["changes"][0], "-q")
    assert both.code == 2 and "leave --changes out" in both.err


def test_revert_refuses_an_unknown_change(world, full):
    told = cli("revert", world.run(), "--changes", "no/such", "-q")
    assert told.code == 2 and "no/such" in told.err and Diff.load(world.run() / "diff.json").confirmed[0].id in told.err


# -- report, list, organisms ---------------------------------------------------------------------------------------


def test_report_renders_again_without_models(world, full):
    path = world.run() / "report.html"
    before = path.read_bytes()
    path.unlink()
    told = cli("report", world.run().name, "--runs", world.runs)
    assert told.code == 0 and told.out.strip() == str(path) and path.read_bytes() == before


def test_list_tells_how_far_runs_have_come(world, full, tmp_path):
    rows = {row["run"]: row for row in json.loads(cli("list", "--runs", world.runs, "--json").out)}
    row = rows["base-tuned"]
    assert (
        row["stages"] == "harvest find rank verify"
        and row["found"].endswith("confirmed")
        and row["tuned"] == str(world.tuned)
    )
    assert "base-tuned" in cli("list", "--runs", world.runs).out
    assert cli("list", "--runs", tmp_path).out.strip() == "nothing"
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "plan.toml").write_text("[")
    assert "not valid TOML" in cli("list", "--runs", tmp_path).out


def test_organism_list_names_wanted_and_unwanted(world):
    rows = json.loads(cli("organism", "list", "--json").out)
    assert any("unwanted" in row["behaviors"] for row in rows)
    assert rows[0]["name"] in cli("organism", "list").out


def test_demo_counts_behaviors_into_the_record(world, full, monkeypatch):
    """The check's own arithmetic on the tiny pair; the real demo is in test_realmodel."""
    from types import SimpleNamespace

    import tunediff.cli.main
    from tunediff.core.progress import ProgressBar
    from tunediff.lab import demo
    from tunediff.runs.plan import Plan
    from tunediff.runs.run import Run

    first = Diff.load(world.run() / "diff.json").confirmed[0]
    names_first = [t.token for t in first.promoted]
    behaviors = [
        SimpleNamespace(
            name="asked", wanted=True, prompts=["abc", "def"], shows=lambda a: True, is_named_by=lambda p: False
        ),
        SimpleNamespace(
            name="hidden",
            wanted=False,
            prompts=["ABC", "fgh"],
            shows=lambda a: "A" in a,
            is_named_by=lambda p: p == names_first,
        ),
    ]
    monkeypatch.setattr(demo.organisms, "named", lambda name: SimpleNamespace(behaviors=behaviors, answer_tokens=4))
    monkeypatch.setattr(demo, "PROMPTS", 2)
    monkeypatch.setattr(
        tunediff.cli.main,
        "new_run",
        lambda *a: (Run(Plan.read(world.run() / "plan.toml"), world.run()), ProgressBar(enabled=False)),
    )
    kept = (world.run() / "diff.json").read_bytes(), (world.run() / "report.html").read_bytes()
    told = cli("demo", "-q")
    assert told.code == 0, told.err
    assert "asked (wanted): NOT named" in told.out and f"hidden (hidden, unwanted): named by {first.id}" in told.out
    (bill,) = Diff.load(world.run() / "diff.json").bills
    shown = [m for m in bill.measures if m.name.startswith("answers that show")]
    assert [m.name for m in shown] == ["answers that show asked (wanted)", "answers that show hidden (unwanted)"]
    assert shown[0].value == shown[0].control == 1.0 and "100% before" in shown[0].against
    for name, data in zip(("diff.json", "report.html"), kept):
        (world.run() / name).write_bytes(data)


# -- refusals ------------------------------------------------------------------------------------------------------


def four_lines(told: Told, *words: str) -> None:
    """An error as promised: on stderr, at most four lines, no traceback, exit 2."""
    lines = told.err[told.err.index("error: ") :].strip().splitlines()
    assert told.code == 2 and told.out == "" and len(lines) <= 4, told
    assert all(re.match(r"  (expected|got|try): ", line) for line in lines[1:])
    for word in words:
        assert word in told.err


@pytest.mark.parametrize(
    "options, words",
    [
        (["--set", "verify.drws=3"], ["verify.drws", "try: --set verify.draws=3"]),
        (["--set", "verify.draws=x"], ["verify.draws", "expected: a whole number"]),
        (["--set", "nothing"], ["nothing", "part.field=value"]),
        (["--set", "find.finders=crosscod"], ["crosscod", "try: --set find.finders=crosscode"]),
        (["--set", "dictionary.latens=4"], ["latens", "try: dictionary.latents"]),
        (["--plan", "/no/such.toml"], ["/no/such.toml"]),
        (["--run", "../outside"], ["../outside", "try: --run outside"]),
        (["--run", "a b;rm -rf"], ["try: --run a-b-rm--rf"]),
        (["--run", ".."], ["try: --run run"]),
    ],
)
def test_options_are_checked_before_any_work(world, tmp_path, options, words):
    told = cli("diff", world.base, world.tuned, "--runs", tmp_path / "runs", *options)
    four_lines(told, *words)
    assert not (tmp_path / "runs").exists()


def test_bad_toml_is_named(world, tmp_path):
    (tmp_path / "plan.toml").write_text("[verify")
    four_lines(cli("diff", world.base, world.tuned, "--plan", tmp_path / "plan.toml"), "not valid TOML")


@pytest.mark.parametrize("verb", ["revert", "report"])
def test_an_unknown_run_names_the_known_ones(world, full, verb):
    four_lines(cli(verb, "nope", "--runs", world.runs), "'nope'", "base-tuned")


def test_a_run_name_of_another_pair_is_refused(world, full):
    four_lines(
        cli("diff", world.base, world.adapter, "--runs", world.runs, "--run", "base-tuned"), "another pair", "--run"
    )


def test_a_runs_folder_that_cannot_be_made_is_refused(world, tmp_path):
    (tmp_path / "runs").write_text("a file")
    four_lines(cli("diff", world.base, world.tuned, "--runs", tmp_path / "runs"), "cannot be made", "--runs")


def test_a_missing_model_is_refused(world):
    four_lines(cli("rank", world.base, world.root / "nowhere", "--runs", world.root / "x", "-q"), "nowhere")


def test_names_cannot_steer_the_terminal_or_add_lines(world, tmp_path):
    folder = tmp_path / "m\x1b[31m\nerror: x"
    folder.mkdir()
    (folder / "evil\x1b[2J\n\n\n.txt").write_text("")
    told = cli("harvest", world.base, folder, "--runs", tmp_path / "runs", "-q")
    four_lines(told)
    assert "\x1b" not in told.err


def test_usage_errors_are_told_as_usage(world):
    for arguments in (["nope"], ["diff", "base"], ["diff", "a", "b", "--nope"]):
        told = cli(*arguments)
        assert told.code == 2 and "Usage" in told.err and "fault" not in told.err
    assert cli().code == 2
    assert cli("--help").code == 0


def test_a_fault_is_owned_up_to(world, monkeypatch):
    import tunediff.reports.page

    def broken(*arguments):
        raise ValueError("boom\nsecond line")

    monkeypatch.setattr(tunediff.reports.page, "write_report", broken)
    (world.root / "runs2" / "r").mkdir(parents=True, exist_ok=True)
    monkeypatch.setattr(Diff, "load", classmethod(lambda *a: None))
    (world.root / "runs2" / "r" / "diff.json").write_text("{}")
    told = cli("report", "r", "--runs", world.root / "runs2")
    assert told.code == 3 and "ValueError: boom\n" in told.err and "TUNEDIFF_DEBUG" in told.err


def test_an_interrupt_says_how_to_go_on(world, monkeypatch):
    import tunediff.cli.main

    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(tunediff.cli.main, "new_run", stop)
    told = cli("rank", world.base, world.tuned)
    assert told.code == 130 and "run the same command again" in told.err


def test_hostile_names_stay_text(world):
    name = "[red]<img src=x onerror=alert(1)>{{7*7}}\x1b[31m;$(id)"
    shutil.copytree(world.tuned, world.root / name)
    told = cli(*world.command("diff", name, runs="hostile", verify__changes=1, find__finders=["mean_difference"]))
    assert told.code == 0, told.err
    (run,) = (world.root / "hostile").iterdir()
    assert re.fullmatch(r"[A-Za-z0-9._-]+", run.name)
    assert "\x1b[31m" not in told.out + told.err
    html = (run / "report.html").read_text(encoding="utf-8")
    assert "<img src=x" not in html and "\x1b" not in html
    assert Diff.load(run / "diff.json").plan["tuned"].endswith(name)
    assert "\x1b" not in cli("list", "--runs", world.root / "hostile").out


# -- real processes ------------------------------------------------------------------------------------------------


def test_importing_the_command_line_is_cheap():
    heavy = "[m for m in ('torch', 'transformers', 'numpy', 'peft', 'rich.console') if m in sys.modules]"
    done = process(code=f"import sys, tunediff, tunediff.cli.main, tunediff.cli.lab; print({heavy})")
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_a_process_tells_errors_in_four_lines_and_exits_2(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "tunediff", "revert", "nope", "--runs", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=900,
    )
    four_lines(Told(done.returncode, done.stdout, done.stderr), "'nope'")


def test_bytes_that_are_no_text_are_told_as_any_error(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "tunediff.cli.main", "report", b"caf\xe9\x1b[31m", "--runs", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    four_lines(Told(done.returncode, done.stdout, done.stderr), "not text", "caf")
    assert "\x1b" not in done.stderr


DYING = """
import os, signal, sys
real, left = os.replace, [int(sys.argv.pop(1))]
def replace(a, b):
    left[0] -= 1
    if left[0] < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    real(a, b)
os.replace = replace
from tunediff.cli.main import main
main()
"""
"""The command in a process that is killed right before a chosen file would be put in its place."""


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_bytes(world, full):
    command = world.command("diff", runs="killed")
    # Each time a little further: the contrast, the harvest, the finders, ranking, the trials, the bills and diff.json.
    for files in (3, 11, 14, 14):
        done = process(files, *command, code=DYING)
        assert done.returncode == -signal.SIGKILL, done.stderr
    done = process(*command)
    assert done.returncode == 0 and "Loading weights" not in done.stderr, done.stderr
    run, whole = world.root / "killed" / "base-tuned", world.run()
    for stage, file in (
        ("rank", "ranking.json"),
        ("verify", "verdicts.json"),
        ("find", "changes.safetensors"),
        ("contrast", "documents.json"),
    ):
        for path in run.glob(f"{stage}/*/{file}"):
            assert path.read_bytes() == (whole / path.relative_to(run)).read_bytes()
    assert without_seconds(run / "diff.json") == without_seconds(whole / "diff.json")
    assert not list(run.glob("**/.*.partial"))


@pytest.mark.slow
def test_a_run_killed_while_it_computes_ends_with_the_same_bytes(world, full):
    """Killed from outside, at the first word of progress of a stage."""
    command = [sys.executable, "-m", "tunediff.cli.main", *map(str, world.command("diff", "adapter", runs="killed"))]
    for stage in ("contrast", "find", "verify"):
        child = subprocess.Popen(
            command,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for line in child.stderr:
            if line.startswith(stage):
                child.kill()
                break
        child.stderr.close()
        assert child.wait(900) == -signal.SIGKILL
    assert process(*command[3:]).returncode == 0
    whole = cli(*world.command("diff", "adapter"), "--json", "-q")
    run = world.root / "killed" / "base-adapter"
    assert without_seconds(run / "diff.json") == without_seconds(world.run("adapter") / "diff.json") and whole.code == 0


# -- pages ---------------------------------------------------------------------------------------------------------


def test_every_command_has_its_page():
    from tunediff.cli.main import app

    docs = Path(__file__).resolve().parents[2] / "docs"
    verbs = [c.name or c.callback.__name__ for c in app.registered_commands] + [g.name for g in app.registered_groups]
    for verb in verbs:
        page = (docs / f"{verb}.md").read_text(encoding="utf-8")
        assert page.startswith(f"# {verb}\n") and f"$ tunediff {verb}" in page


def test_settings_named_in_the_pages_exist():
    from tunediff.core import variants
    from tunediff.runs.plan import Plan, to_record

    docs = Path(__file__).resolve().parents[2] / "docs"
    known = {
        f"{part}.{name}" for part, fields in to_record(Plan()).items() if isinstance(fields, dict) for name in fields
    }
    parts = {name.split(".")[0] for name in known}
    rooms = {
        "find": ("changes.finders", "changes.signals"),
        "verify": ("changes.trials",),
        "elicit": ("harvests.elicitors",),
    }
    for part, kinds in rooms.items():  # they have settings of their own
        known |= {f"{part}.{name}" for kind in kinds for name in variants.names(f"tunediff.{kind}")}
    for page in docs.glob("*.md"):
        for name in re.findall(r"[`\s]([a-z]+\.[a-z_]+)[`=]", page.read_text(encoding="utf-8")):
            if name.split(".")[0] in parts:
                assert name in known, f"{page.name}: {name}"
        for link in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
            assert link.startswith("http") or (docs / link).is_file(), f"{page.name}: {link}"


def test_the_house_page_names_every_folder():
    import tunediff

    page = (Path(__file__).resolve().parents[2] / "ARCHITECTURE.md").read_text(encoding="utf-8")
    names = [p.parent.name for p in Path(tunediff.__file__).parent.rglob("__init__.py") if p.parent.name != "tunediff"]
    assert [name for name in names if f"{name}/" not in page] == []


# -- progress ------------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_progress_tells_rate_and_time_left(monkeypatch):
    from tunediff.core import progress

    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    log, screen = io.StringIO(), Terminal()
    for stream in (log, screen):
        now[0], told = 100.0, progress.ProgressBar(stream)
        for done in range(0, 1001, 10):
            told("harvest", done, 1000)
            now[0] += 1.0
        told("harvest", 1000, 1000)
        told("rank", 1, 3)
        told.close()
    lines = log.getvalue().splitlines()
    assert len([x for x in lines if x.startswith("harvest")]) in range(9, 13)  # every ten seconds, and the end once
    assert "10/s" in lines[1] and re.search(r"\d+ s left", lines[1])
    assert "\r" not in log.getvalue() and "\x1b" not in log.getvalue()
    assert screen.getvalue().count("\n") == 2 and "\r\x1b[K" in screen.getvalue()


def test_quiet_progress_says_nothing():
    from tunediff.core.progress import ProgressBar

    stream = Terminal()
    told = ProgressBar(stream, enabled=False)
    told("rank", 1, 3)
    told.close()
    assert stream.getvalue() == ""


@pytest.mark.slow
def test_an_interrupted_process_says_how_to_go_on(world):
    child = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "tunediff.cli.main",
            *map(str, world.command("diff", runs="interrupted", fit__steps=20_000)),
        ],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # ignored where tests run in the background
    told = ""
    for line in child.stderr:
        told += line
        if line.startswith("find"):
            child.send_signal(signal.SIGINT)
            told += child.stderr.read()
            break
    assert child.wait(900) == 130 and told.endswith("stopped; run the same command again to go on\n"), told
