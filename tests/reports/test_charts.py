"""The chart of a profile: a line for each subject, its band, its control, in the order of the places."""

from __future__ import annotations

import math
import re

from tunediff.records.profile import Profile
from tunediff.reports.charts import profile


def polylines(chart: str) -> list[list[tuple[float, float]]]:
    return [
        [tuple(map(float, point.split(","))) for point in points.split()]
        for points in re.findall(r'<polyline points="([^"]*)"', chart)
    ]


def drawn(**fields) -> str:
    given = {"name": "error", "subjects": ["one"], "places": ["resid.0", "resid.1", "resid.2"]}
    return str(profile(Profile(**{**given, "values": [[1.0, 2.0, 0.0]], **fields}), label="errors"))


def test_a_line_goes_through_the_values_in_order():
    (line,) = polylines(drawn())
    (x0, y0), (x1, y1), (x2, y2) = line
    assert x0 < x1 < x2 and x1 - x0 == x2 - x1 and y1 < y0 < y2  # up is less in SVG
    assert "<title>error: 2.00 at 1</title>" in drawn()  # one kind of site: its layer is label enough


def test_interval_and_control_are_drawn():
    chart = drawn(
        low=[[0.5, 1.5, -0.5]], high=[[1.5, 2.5, 0.5]], control=[[0.1, 0.2, 0.3]], against="chance", unit="nat"
    )
    assert chart.count("<polygon") == 1 and len(polylines(chart)) == 2
    assert 'class="line null dashed"' in chart and "chance" in chart and ">nat<" in chart


def test_steps_are_put_at_their_value():
    (line,) = polylines(drawn(places=["1", "50", "600"], kind="step"))
    (x0, _), (x1, _), (x2, _) = line
    assert math.isclose((x1 - x0) / (x2 - x0), 49 / 599, rel_tol=0.02)


def test_a_line_breaks_between_kinds_of_sites_and_where_nothing_was_measured():
    assert list(map(len, polylines(drawn(places=["resid.0", "resid.1", "mlp.1"])))) == [2, 1]
    assert list(map(len, polylines(drawn(values=[[1.0, math.nan, 0.0]])))) == [1, 1]


def test_each_subject_has_a_line_and_models_keep_their_colors():
    chart = drawn(subjects=["base", "tuned"], values=[[1.0, 2.0, 3.0], [2.0, 1.0, 0.0]])
    assert len(polylines(chart)) == 2 and 'class="line base"' in chart and 'class="line tuned"' in chart
    assert "not measured" in drawn(values=[[math.nan] * 3])


def test_marks_stand_at_places_that_there_are():
    chart = profile(
        Profile("error", ["one"], ["resid.0", "resid.1"], [[1.0, 2.0]]),
        label="errors",
        marks={"resid.1": "chosen: resid.1", "resid.9": "nowhere"},
    )
    assert chart.count('class="mark"') == 1 and "chosen: resid.1" in chart and "nowhere" not in chart
