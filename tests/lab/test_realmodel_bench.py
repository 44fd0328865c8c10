"""The quick bench on real models: the tune that ships, a method beside its control; and the default on a random tune of that
one's size."""

from __future__ import annotations

import pytest

from tunediff.lab import bench, scores

pytestmark = [pytest.mark.realmodel, pytest.mark.slow]


def test_the_quick_bench_tells_a_tune_from_a_null_and_a_method_from_its_control(tmp_path):
    tune, null = (t for t in bench.tunes(None, ["random:0"]) if t.null or t.name == "two-objectives")
    rivals = ["random_directions", "black_box"]
    cells = bench.bench([tune], ["decision_clusters", *rivals], [0], tmp_path, settings=bench.QUICK)
    cells += bench.bench([null], ["default", *rivals], [0], tmp_path, settings=bench.QUICK)
    by = {(c.tune, c.method): c for c in cells}
    found = by["two-objectives", "decision_clusters"]
    assert found.confirmed and any(found.named.values()) and scores.identified(found) == "two-objectives"
    assert not by["two-objectives", "random_directions"].confirmed
    assert not any(by["null random 0", method].confirmed for method in ("default", "random_directions"))
    undone = found.undone
    assert undone is not None and undone.cost <= bench.COST and undone.before["dealer"] > 0.3
    bench.write(tmp_path, "tunediff bench --quick")
    page = (tmp_path / "benchmark.md").read_text()
    assert "## Can it be taken out?" in page and "| random_directions | – | – |" in page
