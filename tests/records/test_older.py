"""Records of older schemas open with every number kept: from a run of version 0.1.0, cut short, its texts redacted."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tunediff.core.artifacts import write_json
from tunediff.core.errors import ArtifactError
from tunediff.records.diff import ChangeRecord, Diff, load_records, load_scan
from tunediff.records.profile import Profile
from tunediff.records.scan import Scan

OLDER = Path(__file__).parent / "older"


def old(name: str):
    return json.loads((OLDER / name).read_text(encoding="utf-8"))


def by_site(profile: Profile) -> dict[str, float]:
    (values,) = profile.values
    return dict(zip(profile.places, values, strict=True))


def same_scan(scan: Scan, rows: list[dict]) -> bool:
    noise = dict(zip(scan.sites, scan.noise, strict=True))
    columns = (scan.relative, scan.offset, scan.ceiling)
    said = [(*(by_site(c)[r["site"]] for c in columns), noise[r["site"]]) for r in rows]
    return (
        said == [(r["relative"], r["offset_share"], r["ceiling"], r["noise"]) for r in rows]
        and scan.sites == [r["site"] for r in rows]
        and scan.chosen == [r["site"] for r in rows if r["chosen"]]
    )


def same_change(change: ChangeRecord, record: dict) -> bool:
    rest = {**json.loads(json.dumps(record)), "depth": None}
    mine = {**change.__dict__, "depth": None}
    plain = json.loads(json.dumps(mine, default=vars))
    return plain == rest and by_site(change.depth) == record["depth"] and change.depth.subjects == [record["id"]]


def test_an_older_diff_opens_with_every_number(tmp_path):
    diff, record = Diff.load(OLDER / "diff.json"), old("diff.json")
    assert same_scan(diff.scan, record["scan"])
    assert [same_change(*both) for both in zip(diff.changes, record["changes"], strict=True)] == [True, True]
    assert diff.changes[0].depth.places == ["resid.5", "resid.10", "resid.14", "resid.19", "resid.23", "resid.28"]

    (fit,), (card,) = diff.fits, record["fits"]
    rows = [dict(zip(card["columns"], row, strict=True)) for row in card["curve"]]
    assert fit.curve.places == ["1", "50", "600"] == [f"{row['step']:g}" for row in rows]
    assert {"step", *fit.curve.subjects} == set(card["columns"])
    for subject, values in zip(fit.curve.subjects, fit.curve.values, strict=True):
        assert values == [row[subject] for row in rows]

    same = set(record) - {"scan", "changes", "fits", "schema"}
    record["corpus"] |= {"remarks": [], "prompt_remarks": []}
    for bill in record["bills"]:
        bill["failed"] = ""
    plain = json.loads(json.dumps(diff.__dict__, default=vars))
    assert {name: plain[name] for name in same} == {name: record[name] for name in same}

    diff.save(tmp_path / "diff.json")
    assert json.loads((tmp_path / "diff.json").read_text())["schema"] == "tunediff.diff/2"
    assert Diff.load(tmp_path / "diff.json") == diff


def test_what_an_older_run_kept_opens(tmp_path):
    assert same_scan(load_scan(OLDER / "scan.json"), old("scan.json"))
    records = load_records(OLDER / "verdicts.json")
    assert all(same_change(*both) for both in zip(records, old("verdicts.json"), strict=True))
    for value, load in ((load_scan(OLDER / "scan.json"), load_scan), (records, load_records)):
        write_json(tmp_path / "again.json", value)
        assert load(tmp_path / "again.json") == value


def test_an_older_scan_without_ceilings_opens(tmp_path):
    write_json(tmp_path / "scan.json", [{k: v for k, v in row.items() if k != "ceiling"} for row in old("scan.json")])
    assert all(math.isnan(value) for value in load_scan(tmp_path / "scan.json").ceiling.values[0])


@pytest.mark.parametrize("lost", ["scan", "changes", "fits"])
def test_a_damaged_older_diff_is_refused(tmp_path, lost):
    write_json(tmp_path / "diff.json", {name: value for name, value in old("diff.json").items() if name != lost})
    with pytest.raises(ArtifactError, match="is damaged") as caught:
        Diff.load(tmp_path / "diff.json")
    assert lost in caught.value.got


def test_another_schema_is_no_diff(tmp_path):
    write_json(tmp_path / "diff.json", {**old("diff.json"), "schema": "tunediff.diff/3"})
    with pytest.raises(ArtifactError, match="is not a diff record") as caught:
        Diff.load(tmp_path / "diff.json")
    assert (caught.value.expected, caught.value.got) == ("tunediff.diff/2", "tunediff.diff/3")
