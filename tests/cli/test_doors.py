"""What comes through the doors: code only from who types it, run folders that move, ordinary files, exit codes."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_world
from command_line import cli
from tiny_world import World

import tunediff
from tunediff.core.errors import SettingError, TunediffError
from tunediff.runs.plan import Plan, settled
from tunediff.runs.run import Run

# -- code ----------------------------------------------------------------------------------------------------------

HOSTILE = """
from pathlib import Path
mark = Path(__file__).with_name("ran")
mark.write_text("imported")
class Called:
    def __new__(cls, *a, **k):
        mark.write_text("called")
    def __init_subclass__(cls, **k):
        mark.write_text("subclassed")
class Spec:
    Spec = Called
def function(*a, **k):
    mark.write_text("called")
"""
PLACES = {
    "find.finders": 'find = {finders = ["%s"]}',
    "find.signals": 'find = {signals = ["%s"]}',
    "find.dictionary": 'find = {dictionary = "%s"}',
    "verify.trials": 'verify = {trials = ["%s"]}',
    "pair.family": 'pair = {family = "%s"}',
}
"""Settings that name code, and a plan with each."""


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """The current folder, with hostile code in it and a run whose plan names it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "hostile.py").write_text(HOSTILE)
    yield tmp_path
    sys.modules.pop("hostile", None)


@pytest.mark.parametrize("place", PLACES)
def test_a_plan_from_elsewhere_imports_nothing_at_any_door(here, place):
    body = PLACES[place] % "hostile:function"
    (here / "plan.toml").write_text(body)
    run = here / "runs" / "r"
    run.mkdir(parents=True)
    (run / "plan.toml").write_text(body)
    doors = [
        lambda: cli("diff", "a", "b", "--plan", "plan.toml"),
        lambda: cli("harvest", "a", "b", "--plan", "plan.toml"),
        lambda: cli("revert", "r"),
        lambda: cli("revert", run, "--set", "find.candidates=3"),
        lambda: tunediff.diff("a", "b", plan="plan.toml"),
        lambda: tunediff.diff("a", "b", plan="plan.toml", find={"candidates": 3}),
        lambda: tunediff.revert(run),
        lambda: tunediff.revert(run, base="a"),
        lambda: Run.open(run),
    ]
    for door in doors:
        try:
            told = door()
            assert told.code == 2 and "--allow-code" in told.err, told
        except TunediffError as error:
            assert "--allow-code" in error.remedy
    assert cli("list").code == 0 and cli("report", "r").code == 2
    assert not (here / "ran").exists() and "hostile" not in sys.modules and str(here) not in sys.path


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", ["hostile:function", "hostile:Called", "hostile:Spec", "os:abort", "json:JSONDecoder"])
def test_what_is_named_is_a_class_of_the_right_kind_before_it_is_called(here, place, name):
    (here / "plan.toml").write_text(PLACES[place] % name)
    for arguments in (["--set", f"{place}={name}"], ["--plan", "plan.toml", "--allow-code"]):
        told = cli("diff", "a", "b", *arguments)
        assert told.code == 2 and f"{name} is no " in told.err, told
    if name.startswith("hostile"):
        assert (here / "ran").read_text() == "imported"


def test_an_organism_is_not_called_either(here):
    told = cli("organism", "make", "hostile:function", here / "out")
    assert told.code == 2 and "is no organism" in told.err and (here / "ran").read_text() == "imported"


@pytest.mark.parametrize(
    "body", ["import sys; sys.exit(0)", "1 / 0", "raise KeyboardInterrupt", "def", "import none_such"]
)
def test_code_that_breaks_on_import_is_told(here, body):
    (here / "hostile.py").write_text(body)
    told = cli("diff", "a", "b", "--set", "find.finders=hostile:F")
    assert (told.code, "cannot be imported" in told.err) in ((2, True), (130, False)), told


@pytest.mark.parametrize("typed", ["find.finders=ab:Finder", "corpus.kind=b:F", "find.b:F.x=1"])
def test_a_name_is_not_allowed_because_another_text_holds_it(tmp_path, typed):
    path = tmp_path / "plan.toml"
    path.write_text(Plan().set("find.signals=b:F").to_toml())
    with pytest.raises(SettingError, match="code of its own: b:F"):
        settled(path, [typed])


def test_the_command_line_finds_no_library_in_the_current_folder(tmp_path):
    for name in ("typer", "rich", "torch", "transformers", "safetensors", "numpy", "click"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('a file beside the plan was imported')")
    command = [sys.executable, "-m", "tunediff", "list"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0 and done.stdout == "nothing\n", done.stderr


# -- places --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return tiny_world.make(tmp_path_factory.mktemp("world"))


def test_a_pair_is_one_run_however_it_is_spelled(world, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(world.root))
    (tmp_path / "link").symlink_to(world.base)
    (tmp_path / "deep").mkdir()
    spelled = {world.root: ["base", "./base", "base/", "../" + world.root.name + "/base", str(world.base), "~/base"]}
    spelled[tmp_path] = ["link", "link/", "deep/../link", "~/base"]
    folders, plans = set(), set()
    for cwd, names in spelled.items():
        monkeypatch.chdir(cwd)
        for name in names:
            plan = settled(
                None, [f"corpus.paths={os.path.relpath(world.root / 'corpus.jsonl')}"], base=name, tuned="demo"
            )
            folders.add(Run.begin(plan, tmp_path / "runs").folder)
            plans.add(plan.to_toml())
    assert folders == {tmp_path / "runs" / "base-demo"} and len(plans) == 1
    assert settled(None, base="org/model", tuned="default").base == "org/model"  # a hub id, and a name


def test_a_link_to_a_file_keeps_the_name_that_tells_its_kind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "blob").write_text("{}")
    (tmp_path / "data.jsonl").symlink_to("blob")
    plan = settled(None, ["corpus.paths=data.jsonl"])
    assert plan.corpus.paths == (str(tmp_path / "data.jsonl"),)


@pytest.mark.slow
def test_a_run_moves_with_its_models(world, monkeypatch, tmp_path):
    """From relative names in one folder to another folder, and to a disk that only reads."""
    home = tmp_path / "old"
    for name in ("base", "tuned"):
        shutil.copytree(world.root / name, home / name)
    monkeypatch.chdir(home)
    told = cli("diff", "base", "./tuned", *world.sets())
    assert told.code == 0, told.err
    record = tunediff.Diff.load(Path("runs/base-tuned/diff.json"))
    assert (record.base.name, record.tuned.name) == ("base", "tuned") and record.confirmed
    id = record.confirmed[0].id
    monkeypatch.chdir(tmp_path)
    assert cli("revert", home / "runs" / "base-tuned", "--changes", id, "-q").code == 0

    shutil.move(home, tmp_path / "new")
    run = tmp_path / "new" / "runs" / "base-tuned"
    assert cli("list", "--runs", run.parent).out.count("base-tuned") == 1
    assert cli("report", run).code == 0
    told = cli("revert", run, "--changes", id)
    assert told.code == 2 and "--set base=PATH --set tuned=PATH" in told.err, told
    before = sorted(str(p) for p in run.glob("*/*/manifest.json"))
    moved = [f"--set={side}={tmp_path / 'new' / side}" for side in ("base", "tuned")]
    told = cli("revert", run, "--changes", id, *moved, "-q")
    assert told.code == 0 and sorted(str(p) for p in run.glob("*/*/manifest.json")) == before, told.err
    assert cli("revert", run, "--changes", id, "-q").code == 0  # the plan holds the new places
    told = cli("diff", "new/base", "new/tuned", "--runs", run.parent, *world.sets(), "-q")
    assert told.code == 0 and sorted(str(p) for p in run.glob("*/*/manifest.json")) == before, told.err


def test_an_older_versions_plan_goes_on_or_is_named(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "base-tuned"
    run.mkdir(parents=True)
    for name in ("base", "tuned"):
        (tmp_path / name).mkdir()
    older = 'base = "base"\ntuned = "./tuned"\n[fit]\nprecision = "float32"\n'
    (run / "plan.toml").write_text(older)
    assert Run.open(run).plan.base == str(tmp_path / "base")
    (run / "plan.toml").write_text(older)
    monkeypatch.chdir("/")
    assert Run.open(run).plan.tuned == str(tmp_path / "tuned")  # looked for where it was typed
    (run / "plan.toml").write_text(older.replace("float32", "float16"))
    told = cli("revert", run)
    assert (
        told.code == 2 and "plan.toml: fit.precision is no setting any more" in told.err and "leave it out" in told.err
    )
    newer = 'base = "base"\ntuned = "tuned"\n[verify]\ndraws_of_each = 3\n[rank]\nnull = 3\n'
    (run / "plan.toml").write_text(newer)
    told = cli("revert", run)
    assert told.code == 2 and "plan.toml: there is no setting 'rank.null'" in told.err and "rank.nulls" in told.err
    assert "rank.null'" in cli("list", "--runs", tmp_path / "runs").out
    monkeypatch.chdir(tmp_path)
    assert Run.begin(settled(None, base="base", tuned="tuned"), Path("runs")).plan.rank.nulls == 19  # replaced


def test_another_pair_of_the_same_names_is_still_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for place in ("a/base", "a/tuned", "b/base", "b/tuned"):
        (tmp_path / place).mkdir(parents=True)
    Run.begin(settled(None, base="a/base", tuned="a/tuned"), Path("runs"))
    with pytest.raises(TunediffError, match="another pair") as caught:
        Run.begin(settled(None, base="b/base", tuned="b/tuned"), Path("runs"))
    option, name = caught.value.remedy.split()
    assert option == "--run" and Run.begin(settled(None, base="b/base", tuned="b/tuned"), Path("runs"), name)
    shutil.rmtree(tmp_path / "a")  # its models have moved
    assert Run.begin(settled(None, base="b/base", tuned="b/tuned"), Path("runs")).folder.name == "base-tuned"


@pytest.mark.parametrize("arguments", [["diff", "a", "b", "--plan", "pipe"], ["report", "pipe"], ["revert", "pipe"],
    ["list", "--runs", "pipe"], ["report", "pipe.json"], ["revert", "folder"], ["diff", "base", "pipe"],
    ["harvest", "model", "demo"], ["diff", "a", "b", "--plan", "/dev/zero"], ["revert", ""], ["report", "x" * 5000],
    ["diff", "a", "b", "--plan", "."]])  # fmt: skip
def test_a_pipe_is_not_waited_for(tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    for name in ("pipe", "pipe.json", "folder/plan.toml", "model/config.json", "model/model.safetensors"):
        Path(name).parent.mkdir(exist_ok=True)
        os.mkfifo(name)
    told = cli(*arguments)
    assert told.code == (0 if arguments[0] == "list" else 2), told
    assert told.out or len(told.err[told.err.index("error: ") :].splitlines()) <= 4, told


# -- endings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "raised, code, words",
    [
        (MemoryError(), 2, ["not enough memory", "--set harvest.store=none"]),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory"), 2, ["memory"]),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), 2, ["not enough memory"]),
        (OSError(errno.ENOSPC, "No space left on device"), 2, ["disk is full", "it goes on"]),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), 2, ["disk is full"]),
        (Exception("I/O error: No space left on device (os error 28)"), 2, ["disk is full"]),
        (PermissionError(errno.EACCES, "Permission denied", "/x/y"), 2, ["/x/y cannot be used", "Permission denied"]),
        (OSError(errno.ENAMETOOLONG, "File name too long", "x"), 2, ["too long"]),
        (UnicodeEncodeError("utf-8", "caf\udce9", 3, 4, "surrogates not allowed"), 2, ["not text"]),
        (KeyboardInterrupt(), 130, ["run the same command again"]),
        (ZeroDivisionError("x"), 3, ["ZeroDivisionError", "TUNEDIFF_DEBUG"]),
        (SystemExit(0), 3, ["SystemExit"]),
        (SystemExit(1), 3, ["SystemExit"]),
        (GeneratorExit(), 3, ["GeneratorExit"]),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 141, []),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_every_ending_has_its_code(monkeypatch, tmp_path, raised, code, words):
    import tunediff.cli.main

    def raising(*arguments):
        raise raised

    monkeypatch.setattr(tunediff.cli.main, "new_run", raising)
    monkeypatch.setattr(os, "dup2", lambda *a: None)
    told = cli("rank", "a", "b")
    assert told.code == code and told.out == "" and len(told.err.splitlines()) <= 4, told
    assert all(word in told.err for word in words) and "Traceback" not in told.err and bool(told.err) == bool(words)


def test_a_debugged_fault_shows_its_place_and_keeps_its_code(monkeypatch):
    import tunediff.cli.main

    def raising(*arguments):
        raise ValueError("x\x1b[31m")

    monkeypatch.setattr(tunediff.cli.main, "new_run", raising)
    monkeypatch.setenv("TUNEDIFF_DEBUG", "1")
    told = cli("rank", "a", "b")
    assert told.code == 3 and "Traceback" in told.err and "raising" in told.err and "\x1b" not in told.err


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_output_that_cannot_be_written_is_told(tmp_path):
    command = [sys.executable, "-m", "tunediff", "list", "--runs", str(tmp_path)]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=900)
    assert done.returncode == 2 and done.stderr.startswith("error: the disk is full"), done
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=900)
    os.close(writer)
    assert done.returncode == 141 and done.stderr == "", done
