"""The bench: cells are run once, nulls hold nothing, and the table counts what it says."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import tiny_models
import torch
from test_cli import SETTINGS, cli, world  # noqa: F401  (the fixture)

from tunediff import bench
from tunediff.artifacts import read_json
from tunediff.bench import Cell
from tunediff.calibrations import Calibration
from tunediff.errors import SettingError
from tunediff.nulls import NULLS
from tunediff.pairs import Pair


def cell(tune: str, method: str, score: float, confirmed: int = 0, named: tuple[bool, ...] = (), null: bool = False, **shares) -> Cell:
    return Cell("", tune, null, method, 0, 3, 0.05, score, 1.0, [f"c{i}" for i in range(confirmed)],
                {f"b{i}": ["c0"] * n for i, n in enumerate(named)}, shares, None, None, None, 1.0, 100.0)


def test_the_table_counts_what_it_says():
    cells = [
        cell("two-objectives", "m", 9.0, 2, (True, False), **{"two-objectives": 0.4, "false-facts": 0.1}),
        cell("false-facts", "m", 0.5, 0, (False,), **{"two-objectives": 0.0, "false-facts": 0.0}),
        cell("null random 0", "m", 1.0, 1, null=True), cell("null random 1", "m", 0.2, null=True),
    ]
    (row,) = bench.table(cells)
    assert row["tunes found"].startswith("1/2 ") and row["nulls claimed"].startswith("1/2 ")
    assert row["behaviors named"].startswith("1/3 ") and row["tune identified"].startswith("1/2 ")
    assert row["planted words"].startswith("0.20 [") and row["area under ROC"].startswith("0.75 [")
    page = bench.render(cells[:1] + cells[2:] + [cell("false-facts", "n", 2.0, 1, (True,))], "tunediff bench")
    assert "| m | part | found | – | not run |" in page and "| n | not run | not run | not run | named |" in page


def test_detecting_or_abstaining_is_scored_by_rank():
    assert bench.roc_area([3.0, 2.0], [1.0]).value == 1.0 and bench.roc_area([1.0], [1.0, 2.0]).value == 0.25
    assert bench.roc_area([], [1.0]).value != bench.roc_area([], [1.0]).value, "nothing to say without both"


def test_variants_of_one_organism_count_as_one():
    assert bench.family("false-facts-full") == bench.family("false-facts") == "false-facts"
    assert bench.identified(cell("false-facts", "m", 1.0)) == ""


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Pair:
    root = tmp_path_factory.mktemp("nulls")
    base = tiny_models.save(root / "base", tiny_models.module("llama"))
    return Pair.load(base, tiny_models.adapter(root / "tuned", tiny_models.module("llama")))


@pytest.mark.parametrize("name", NULLS)
def test_nulls_leave_the_pair_alone_and_hold_no_tune(pair, name):
    ids = torch.randint(3, 259, (3, 17), generator=torch.Generator().manual_seed(0))
    before = pair.tuned.states(ids)
    null = NULLS[name](pair, 0)
    changed = null.tuned.states(ids) - null.base.states(ids)
    assert torch.equal(null.base.states(ids), pair.base.states(ids)) and torch.equal(pair.tuned.states(ids), before)
    if name == "identical":
        assert not changed.any() and null.tuned_fingerprint == null.base_fingerprint
        return
    assert changed.any() and not torch.allclose(null.tuned.states(ids), before, atol=1e-4)
    assert null.tuned_fingerprint not in (pair.tuned_fingerprint, pair.base_fingerprint)
    if name in ("random", "permuted"):
        assert NULLS[name](pair, 1).tuned_fingerprint != null.tuned_fingerprint
        assert not torch.equal(NULLS[name](pair, 1).tuned.states(ids), null.tuned.states(ids))
        assert torch.equal(NULLS[name](pair, 0).tuned.states(ids), null.tuned.states(ids))


def test_a_bench_runs_each_cell_once(world, tmp_path, monkeypatch):  # noqa: F811
    tuned = tiny_models.adapter(tmp_path / "tunes" / "false-facts", tiny_models.module("llama"))
    (tmp_path / "tunes" / "false-facts" / "card.json").write_text("{}")
    command = ["bench", "--base", world.base, "--tunes", tmp_path / "tunes", "--out", tmp_path / "out", "-q", "--nulls", "random:1",
               "--methods", "mean_difference,random_directions", "--json", *world.sets()]
    told = cli(*command)
    assert told.code == 0, told.err
    rows = json.loads(told.out)
    assert [row["method"] for row in rows] == ["mean_difference", "random_directions"]
    cells = read_json(tmp_path / "out" / "bench.json")["cells"]
    assert [(c["tune"], c["is_null"]) for c in cells] == [("false-facts", False)] * 2 + [("null random 1", True)] * 2
    assert len(list((tmp_path / "out" / "runs").glob("*/harvest/*/manifest.json"))) == 2, "methods of one tune share a harvest"
    assert "## Tune by tune" in (tmp_path / "out" / "benchmark.md").read_text()
    monkeypatch.setattr(bench, "Run", None)  # whoever runs a cell again fails
    assert cli(*command).out == told.out and tuned


def test_unknown_names_are_refused(tmp_path):
    with pytest.raises(SettingError, match="no null"):
        bench.tunes(None, ["nothing"])
    with pytest.raises(SettingError, match="no method"):
        bench.bench(bench.tunes(None), ["nothing"], [0], tmp_path)
    assert cli("bench", "--seeds", "one").code == 2


def test_a_calibrated_base_asks_for_more(world, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("TUNEDIFF_CACHE", str(tmp_path / "cache"))
    told = cli("calibrate", world.base, "--count", 2, "--runs", tmp_path / "runs", "-q", "--json", *world.sets(verify__changes=0))
    assert told.code == 0, told.err
    measured = json.loads(told.out)
    assert len(measured["scores"]) == 2 and measured["claimed"] == 0 and "0.003" in measured["nulls"][0] != measured["nulls"][1]
    kept = Calibration.of(measured["base"])
    assert kept.scores == measured["scores"] and kept.threshold >= 0.0 and Calibration.of("another") is None
    before = cli(*world.command("verify", runs="calibrated"), "--json")
    replace(kept, scores=[1e9, 2e9], level=0.05).save()
    after = cli(*world.command("verify", runs="calibrated"), "--json")
    assert before.code == after.code == 0, after.err
    assert any("null pairs" not in r["reason"] for r in json.loads(before.out))
    assert all(r["decision"] == "refuted" and "calibrated threshold 1.95e+09" in r["reason"] for r in json.loads(after.out))
    assert cli("calibrate", world.base, "--count", 0).code == 2
