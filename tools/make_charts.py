"""Draw docs/speed-*.svg and docs/floor-*.svg from benchmarks/results: ``python tools/make_charts.py``."""

from __future__ import annotations

import json
import math
from pathlib import Path

from tunediff.reports.charts import Line, alone, bars, lines, strip

ROOT = Path(__file__).resolve().parent.parent
RESULTS, DOCS = ROOT / "benchmarks" / "results", ROOT / "docs"


def read(name: str) -> dict:
    """The stored result of one benchmark."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def rivals() -> str:
    """Time of other libraries for the same work, as a multiple of tunediff's."""
    rows = []
    for shape in read("train_step")["shapes"]:
        for rival, ratio in shape["contenders"]["ours"]["times_as_long"].items():
            if "," not in rival:
                rows.append((f"step {shape['n']} x {shape['F']}: {rival}", list(ratio.values())))
    for rival, ratio in read("harvest")["ratio"].items():
        rows.append((f"harvest: {'plain forwards' if rival == 'naive' else rival}", list(ratio.values())))
    return strip(
        rows,
        label="Others beside ours",
        x_label="times as long as ours: smallest, median, largest",
        marks=[(1.0, "ours")],
    )


def stages() -> str:
    """Seconds of each stage of the demo, beside the least time that its matrix products need."""
    rows = [(row["stage"], row["seconds"], row.get("limit_seconds", 0.0)) for row in read("end_to_end")["stages"]]
    return bars(rows, label="A whole diff by stage", x_label="seconds; line: its matrix products alone")


def growth() -> str:
    """Seconds of a harvest and of a dictionary fit against the number of tokens."""
    series = read("scaling")["series"]
    drawn = [
        Line(name, [(p["tokens"] / 1000, p["seconds"]) for p in series[name]["points"]], tone)
        for name, tone in (("harvest, tokens", "ink"), ("fit, tokens", "null"))
    ]
    return lines(drawn, label="Time against tokens", x_label="thousand tokens", y_label="CPU seconds")


def floor(measure: str, says: str) -> str:
    """Match of the best candidate with a change planted at 1 % of the tokens, against the change's amplitude."""
    mine = [d for d in read("floor")["detections"] if d["frequency"] == 0.01]
    looks = {"delta": ("ink", False), "batchtopk": ("ink", True), "principal": ("null", False)}
    drawn = [
        Line(
            method,
            [(math.log10(d["amplitude"]), d[measure]) for d in mine if d["method"] == method],
            tone,
            dashed=dashed,
        )
        for method, (tone, dashed) in looks.items()
    ]
    named = [(math.log10(a), f"{a:g}") for a in sorted({d["amplitude"] for d in mine})]
    return lines(
        drawn,
        label=f"{says} against amplitude",
        x_label="planted length over the stream's norm",
        y_label=says,
        x_ticks=named,
    )


if __name__ == "__main__":
    drawn = {
        "speed-rivals": rivals(),
        "speed-stages": stages(),
        "speed-growth": growth(),
        "floor-cosine": floor("cosine", "cosine to what was planted"),
        "floor-area": floor("auroc", "area under the curve of firing"),
    }
    for name, chart in drawn.items():
        (DOCS / f"{name}.svg").write_text(alone(chart))
