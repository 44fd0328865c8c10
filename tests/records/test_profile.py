"""Profiles: checked on making, cut by label, saved and read back with every number."""

from __future__ import annotations

import dataclasses
import math

import pytest

from tunediff.core.artifacts import write_json
from tunediff.core.errors import ArtifactError, NumericsError, SettingError
from tunediff.records.measure import Measure
from tunediff.records.profile import Profile

PROFILE = Profile(
    "error",
    ["one", "two"],
    ["resid.0", "resid.1", "mlp.1"],
    [[1.0, 2.0, 3.0], [4.0, math.nan, 6.0]],
    "nat",
    "here",
    low=[[0.5, 1.5, 2.5], [3.5, 4.5, 5.5]],
    high=[[1.5, 2.5, 3.5], [4.5, 5.5, 6.5]],
    control=[[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]],
    against="chance",
)


@pytest.mark.parametrize("profile", [PROFILE, Profile("bare", ["a"], ["1"], [[0.25]])])
def test_a_saved_profile_comes_back(tmp_path, profile):
    profile.save(tmp_path / "profile.json")
    back = Profile.load(tmp_path / "profile.json")
    assert repr(dataclasses.asdict(back)) == repr(dataclasses.asdict(profile))  # NaN is unlike itself


def test_another_schema_is_refused(tmp_path):
    write_json(tmp_path / "other.json", {"schema": "tunediff.diff/2"})
    with pytest.raises(ArtifactError, match="is not a profile") as caught:
        Profile.load(tmp_path / "other.json")
    assert caught.value.got == "tunediff.diff/2" and caught.value.expected == "tunediff.profile/1"


def test_parts_are_cut_by_label_in_the_order_asked_for():
    part = PROFILE.only(["two"], ["mlp.1", "resid.0"])
    assert (part.subjects, part.places, part.values) == (["two"], ["mlp.1", "resid.0"], [[6.0, 4.0]])
    assert (part.low, part.high, part.control) == ([[5.5, 3.5]], [[6.5, 4.5]], [[0.6, 0.4]])
    assert (part.name, part.unit, part.against) == ("error", "nat", "chance")
    assert PROFILE.only(places=["resid.0"]).values == [[1.0], [4.0]]
    assert PROFILE.measure("one", "resid.1") == Measure(
        "error, one at resid.1", 2.0, 1.5, 2.5, "nat", control=0.2, against="chance"
    )


def test_a_label_that_is_not_there_is_refused():
    for labels in ({"subjects": ["three"]}, {"places": ["resid.9"]}):
        with pytest.raises(SettingError, match="has no (subject 'three'|place 'resid.9')"):
            PROFILE.only(**labels)


@pytest.mark.parametrize(
    "fault",
    [
        {"values": [[1.0, 2.0, 3.0]]},
        {"control": [[1.0, 2.0], [3.0, 4.0]]},
        {"low": None},
        {"subjects": ["one", "one"]},
        {"places": ["mlp.1", "resid.1", "mlp.1"]},
    ],
)
def test_what_does_not_fit_together_is_refused(fault):
    with pytest.raises(NumericsError, match="profile 'error'") as caught:
        dataclasses.replace(PROFILE, **fault)
    assert len(caught.value.lines()) == 4


def test_rows_of_a_table_become_a_profile():
    rows = [{"loss": 2.0, "step": 1.0}, {"loss": None, "step": 50.0, "later": 3.0}]
    profile = Profile.of_rows("curve", rows, "step", "fit")
    assert (profile.subjects, profile.places, profile.kind) == (["loss"], ["1", "50"], "step")
    assert profile.values[0][0] == 2.0 and math.isnan(profile.values[0][1])
    assert Profile.of_rows("curve", [{"loss": 2.0}, {"loss": 1.0}], "step", "fit").places == ["0", "1"]


def test_a_notebook_shows_a_small_table_in_which_hostile_labels_stay_text():
    hostile = Profile("<b>", ["<script>"], [f"\u202e{i}" for i in range(40)], [[float(i) for i in range(40)]])
    shown = hostile._repr_html_()
    assert "<script>" not in shown and "<b>" not in shown and "\u202e" not in shown
    assert shown.count("<td>") <= 12 and "28 more places" in shown
    assert repr(PROFILE) == "Profile('error': 2 x 3, places are sites, nat)"
