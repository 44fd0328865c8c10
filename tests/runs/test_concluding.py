"""The finding is on disk before anything is priced; what goes wrong in pricing is told, and the rest goes on."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import support_diffs

from tunediff.core.errors import FamilyError, NumericsError
from tunediff.records.diff import Bill, Diff
from tunediff.reports.page import render_report
from tunediff.reports.terminal import summary_table
from tunediff.runs.plan import Plan
from tunediff.runs.run import Run

FAULTS = {
    "a": FamilyError("the inputs of a map are not seen", remedy="--no-undo"),
    "b": NumericsError("a number is not finite"),
    "c": KeyError("layers.0.mlp"),
}


class Priced(Run):
    """A run whose finding is made already, and whose bills fail as told."""

    @property
    def undoable(self) -> list[str]:
        return [*FAULTS, "d"]

    def diff(self, billed=()) -> Diff:
        return dataclasses.replace(support_diffs.full_diff(), bills=list(billed))

    def bill(self, ids) -> Bill:
        assert Diff.load(self.folder / "diff.json").bills == [] and (self.folder / "report.html").is_file()
        if ids[0] in FAULTS:
            raise FAULTS[ids[0]]
        if ids[0] == "stop":
            raise KeyboardInterrupt
        return Bill("revert", "revert", list(ids), [])


@pytest.fixture
def run(tmp_path: Path) -> Priced:
    return Priced(Plan().set("edit.bills=4"), tmp_path)


def test_bills_that_fail_are_told_and_the_others_go_on(run):
    diff = run.conclude()
    assert [bill.changes for bill in diff.bills] == [["a"], ["b"], ["c"], ["d"]]
    told = [bill.failed for bill in diff.bills]
    assert "not seen" in told[0] and "--no-undo" in told[0] and "not finite" in told[1] and told[3] == ""
    assert "KeyError" in told[2] and "fault in tunediff" in told[2]
    assert Diff.load(run.folder / "diff.json").bills == diff.bills
    assert "not seen" in render_report(diff) and "not seen" in (run.folder / "report.html").read_text()
    assert summary_table(diff)


def test_an_interrupt_while_pricing_leaves_the_finding(run, monkeypatch):
    monkeypatch.setattr(Priced, "undoable", ["d", "stop"])
    with pytest.raises(KeyboardInterrupt):
        run.conclude()
    assert Diff.load(run.folder / "diff.json").bills == []
    monkeypatch.setattr(Priced, "undoable", ["d"])
    assert [bill.failed for bill in run.conclude().bills] == [""]


def test_nothing_is_priced_unasked(run, monkeypatch):
    monkeypatch.setattr(Priced, "bill", None)
    assert run.conclude(undo=False).bills == []
