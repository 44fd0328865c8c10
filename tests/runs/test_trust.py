"""Runs that are killed, raced or damaged end with the bytes of an undisturbed one, or are refused by name.

The same code with larger numbers writes the tables of docs/trust.md: ``python benchmarks/trust.py``.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import trust
from command_line import cli

from tunediff.models import shipped

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    with trust.serving() as server:
        yield trust.Bench(tmp_path_factory.mktemp("trust"), server)


def test_killed_runs_end_with_the_same_bytes(bench):
    tallies = bench.kills(3)
    assert not [bad for tally in tallies.values() for bad in tally.bad]
    assert sum(tally.tries for tally in tallies.values()) >= 12


def test_processes_in_one_folder_end_with_the_same_bytes(bench):
    tally = bench.races(3)
    assert tally.tries == 3 and not tally.bad


def test_several_processes_may_use_the_embedded_base_first(bench):
    tally = bench.first_uses(12)
    assert tally.tries == 12 and not tally.bad


def test_damage_is_never_believed(bench):
    """A fixed sample of all cases; each file of a stage is damaged in `tests/core/test_manifests.py`, too."""
    tallies = bench.damages(every=60)
    assert not [bad for tally in tallies.values() for bad in tally.bad]
    assert sum(tally.tries for tally in tallies.values()) >= 6


def test_a_finished_run_is_written_to_no_more(bench):
    """So it opens on a read-only disk: the same command, and a report, leave every file as it is."""

    def stamps() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in bench.whole.rglob("*")}

    before = stamps()
    for verb in ("diff", "report"):
        (end,) = bench.server.run({"arguments": bench.arguments(bench.whole, verb)})
        assert end["code"] == 0, end["told"]
    assert stamps() == before


def test_a_finished_run_on_a_read_only_disk_is_read(bench, tmp_path):
    mount = ["mount", "--bind", str(bench.whole), str(tmp_path)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting read-only needs root")
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", str(tmp_path)], check=True)
        for arguments in (
            bench.arguments(tmp_path),
            ["list", "--runs", str(tmp_path.parent)],
            ["report", str(tmp_path)],
        ):
            (end,) = bench.server.run({"arguments": arguments})
            assert end["code"] == 0, end["told"]
        (end,) = bench.server.run({"arguments": bench.arguments(tmp_path, seed=5)})
        assert end["code"] == 2 and "Read-only" in end["told"]
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


@pytest.mark.parametrize("limit", [3_000, 60_000])
def test_a_limit_on_files_is_told_and_the_run_goes_on(bench, limit):
    """As a disk that fills up: four lines, nothing half written, and the same command goes on."""
    run = bench.fresh(f"limited-{limit}")
    (end,) = bench.server.run({"arguments": bench.arguments(run), "limit": limit})
    told = end["told"][end["told"].index("error: ") :].strip().splitlines()
    assert end["code"] == 2 and len(told) <= 4 and "bytes of space" in end["told"]
    assert not list(run.rglob("*.partial")) and not list(run.rglob(".*.lock"))
    bench.diff(run)
    assert bench.fault(run) == ""


def test_a_bake_on_a_full_disk_is_told_and_leaves_nothing(bench, tmp_path):
    """At the weights, and at the tokenizer, whose library raises an error of its own."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(tmp_path)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    run = bench.fresh("to-bake")
    shutil.copytree(bench.whole, run)
    try:
        for used in (290_000, 110_000, 106_000, 102_000, 98_000):
            (tmp_path / "other").write_bytes(b"x" * used)
            told = cli("revert", run, "--bake", tmp_path / "baked", "-q")
            if told.code:
                error = told.err[told.err.index("error: ") :].strip().splitlines()
                assert told.code == 2 and len(error) <= 4 and "space" in told.err
                assert [path.name for path in tmp_path.iterdir()] == ["other"]
            else:
                shutil.rmtree(tmp_path / "baked")
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_a_damaged_embedded_base_is_made_again(bench, tmp_path, monkeypatch, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setattr(shipped, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(shipped, "_fetch", lambda scratch, name: scratch)
    base = str(bench.world.base)
    models = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    monkeypatch.setattr(shipped, "load_gguf", lambda path: models)
    folder = shipped.base_folder()
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    for name in whole:
        data = bytearray(whole[name])
        data[len(data) // 2] ^= 4
        (folder / name).write_bytes(data)
        assert shipped.base_folder() == folder
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole
        assert name in capsys.readouterr().err
