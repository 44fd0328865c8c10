"""Charts as inline SVG: pure functions that escape every string they are given.

Colors come from the page's style sheet by class: ``base`` and ``tuned`` mark the two models and nothing else, ``ink``
a measured value, ``null`` its control.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from types import MappingProxyType
from typing import Any

from markupsafe import Markup, escape

from tunediff.core.axes import MODELS
from tunediff.core.text import NOT_MEASURED, finite, number
from tunediff.records.profile import Profile

WIDTH = 360
"""Width of a chart in SVG units: the width of a phone."""


def tag(name: str, *children: Any, **attributes: Any) -> Markup:
    """An element, all escaped; attributes lose a trailing ``_``, other ``_`` become ``-``, None is left out."""
    told = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_plain(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Markup("<{0}{1}>{2}</{0}>").format(
        Markup(name), Markup(told), Markup("").join(escape(child) for child in children)
    )


def _plain(value: Any) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def spread(values: Sequence[float | None], *, zero: bool = True) -> tuple[float, float]:
    """The smallest and largest finite value, with 0 between them if `zero`; never an empty range."""
    kept = [float(v) for v in values if v is not None and finite(v)] + ([0.0] if zero else [])
    low, high = min(kept, default=0.0), max(kept, default=1.0)
    return (low, high) if high > low else (low, low + (abs(low) or 1.0))


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """At most about `count` round numbers (1, 2 or 5 times a power of ten) from `low` to `high`."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(m for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
    return [k * step for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _tick(value: float) -> str:
    return f"{round(value, 12):,g}".replace("-", "−") if abs(value) < 1e5 else number(float(value))


def bar(
    value: float | None,
    low: float | None = None,
    high: float | None = None,
    control: float | None = None,
    *,
    extent: tuple[float, float],
    tone: str = "ink",
    label: str = "",
    mirrored: bool = False,
) -> Markup:
    """One bar from zero to `value` on the scale `extent`, the interval as a whisker and the control as an upright line.

    Stretches to the cell it stands in. `label` is read aloud and shown on hover; `mirrored` grows to the left.
    """
    start, end = extent

    def x(v: float) -> float:
        share = min(1.0, max(0.0, (v - start) / (end - start)))
        return 2 + 196 * (1 - share if mirrored else share)

    parts: list[Markup] = [tag("title", label)] if label else []
    parts.append(tag("rect", x=0, y=4, width=200, height=10, class_="track"))
    if value is not None and not math.isnan(value):
        a, b = sorted((x(0.0), x(value)))
        parts.append(tag("rect", x=a, y=4, width=max(b - a, 0.6), height=10, class_=f"fill {tone}"))
    if start < 0 < end:
        parts.append(tag("line", x1=x(0.0), x2=x(0.0), y1=1, y2=17, class_="axis"))
    if low is not None and high is not None and not math.isnan(low) and not math.isnan(high):
        parts.append(tag("line", x1=x(low), x2=x(high), y1=9, y2=9, class_="whisker"))
        parts += [tag("line", x1=x(e), x2=x(e), y1=6, y2=12, class_="whisker") for e in (low, high)]
    if control is not None and finite(control):
        parts.append(tag("line", x1=x(control), x2=x(control), y1=0, y2=18, class_="control"))
    return tag(
        "svg",
        *parts,
        class_="bar",
        viewBox="0 0 200 18",
        preserveAspectRatio="none",
        role="img",
        aria_label=label or None,
        aria_hidden=None if label else "true",
    )


Point = tuple[float, ...]
"""A point of a line (x, y) or of a band (x, low, high)."""


@dataclass(frozen=True)
class Line:
    """A line of a chart: (x, y) points, a `band` of (x, low, high), its color class, and whether it is dashed."""

    name: str
    points: Sequence[Point]
    tone: str = "ink"
    band: Sequence[Point] = ()
    dashed: bool = False


def lines(
    series: Sequence[Line],
    *,
    label: str,
    x_label: str,
    y_label: str,
    x_ticks: Sequence[tuple[float, str]] | None = None,
    marks: Sequence[tuple[float, str]] = (),
    zero: bool = True,
) -> Markup:
    """A line chart with bands. Points that are not finite are left out and break the line.

    `label` says what the chart shows, for a reader who does not see it; `x_ticks` names positions (thinned to fit);
    `marks` are named upright lines; `zero` keeps 0 on the y axis.
    """
    xs = [x for s in series for x, _ in s.points] + [b[0] for s in series for b in s.band]
    ys = [y for s in series for _, y in s.points] + [v for s in series for b in s.band for v in b[1:]]
    keyed = len(series) > 1 or any(s.band for s in series)
    left, right, top, height = 44, WIDTH - 10, (26 if keyed else 8) + (18 if y_label else 4), 150
    (x0, x1), (y0, y1) = spread(xs, zero=False), spread(ys, zero=zero)
    if not any(map(finite, ys)):
        return tag("p", f"{label}: {NOT_MEASURED}.", class_="empty")
    y_ticks = ticks(y0, y1)
    step = y_ticks[1] - y_ticks[0] if len(y_ticks) > 1 else 0.0
    y1 = max(y1, math.ceil(y1 / step - 1e-9) * step) if step else y1
    y0 = min(y0, math.floor(y0 / step + 1e-9) * step) if step else y0
    y_ticks = ticks(y0, y1, 5)

    def px(x: float) -> float:
        return left + 8 + (right - left - 16) * (x - x0) / (x1 - x0)

    def py(y: float) -> float:
        return top + height * (1 - (y - y0) / (y1 - y0))

    parts = [tag("title", label), *(_legend(series) if keyed else [])]
    if y_label:
        parts.append(tag("text", y_label, x=0, y=top - 10, class_="label"))
    for y in y_ticks:
        parts.append(tag("line", x1=left, x2=right, y1=py(y), y2=py(y), class_="axis" if y == 0 else "grid"))
        parts.append(tag("text", _tick(y), x=left - 6, y=py(y) + 4, class_="tick end"))
    named = list(x_ticks) if x_ticks is not None else [(x, _tick(x)) for x in ticks(x0, x1)]
    widest = max((len(text) for _, text in named), default=1)
    keep = max(1, math.ceil(len(named) * (widest * 6.4 + 8) / (right - left)))
    for x, text in named[::keep]:
        parts.append(tag("text", _cut(text, 14), x=px(x), y=top + height + 16, class_="tick mid"))
    parts.append(tag("text", x_label, x=right, y=top + height + 34, class_="label end"))
    for x, _ in marks:
        parts.append(tag("line", x1=px(x), x2=px(x), y1=top, y2=top + height, class_="mark"))
    for s in series:
        for band in _runs(s.band):
            if len(band) > 1:
                ring = [(x, a) for x, a, _ in band] + [(x, b) for x, _, b in reversed(band)]
                parts.append(tag("polygon", points=_path(ring, px, py), class_=f"band {s.tone}"))
        for run in _runs(s.points):
            parts.append(tag("polyline", points=_path(run, px, py), class_=f"line {s.tone}{' dashed' * s.dashed}"))
        if len(s.points) <= 64:
            for x, y in s.points:
                if finite(x) and finite(y):
                    told = next((text for at, text in named if at == x), _tick(x))
                    dot = tag("title", f"{s.name}: {number(float(y))} at {told}")
                    parts.append(tag("circle", dot, cx=px(x), cy=py(y), r=2.6, class_=f"dot {s.tone}"))
    for x, text in marks:
        side = "end" if px(x) > WIDTH * 0.6 else ""
        parts.append(
            tag("text", _cut(text, 24), x=px(x) + (-5 if side else 5), y=top + 10, class_=f"tick strong {side}")
        )
    return _chart(parts, top + height + 40, label)


def profile(
    shown: Profile, *, label: str, marks: Mapping[str, str] = MappingProxyType({}), zero: bool = True
) -> Markup:
    """Any profile as a line chart: a line with its band for each subject, and its control dashed.

    Places that are numbers are put at their value, others side by side; the line breaks between kinds of sites.

    label   what the chart shows, for a reader who does not see it
    marks   named upright lines at some places
    zero    whether to keep 0 on the y axis
    """
    by_value = all(map(_is_number, shown.places))
    xs = [float(place) if by_value else float(i) for i, place in enumerate(shown.places)]
    kinds = [place.rpartition(".")[0] if shown.kind == "site" and not by_value else "" for place in shown.places]

    def broken(points: Iterable[Point]) -> list[Point]:
        """Points with one that is not a number wherever the kind of site changes."""
        out: list[Point] = []
        for i, point in enumerate(points):
            if i and kinds[i] != kinds[i - 1]:
                out.append((math.nan,) * len(point))
            out.append(point)
        return out

    series = []
    for i, subject in enumerate(shown.subjects):
        tone = subject if subject in MODELS else "ink"
        band = zip(xs, shown.low[i], shown.high[i]) if shown.low and shown.high else ()
        name = subject if len(shown.subjects) > 1 else shown.name
        series.append(Line(name, broken(zip(xs, shown.values[i])), tone, broken(band)))
        if shown.control:
            series.append(Line(shown.against or "control", broken(zip(xs, shown.control[i])), "null", dashed=True))
    short = len(set(kinds)) == 1 and kinds[0]
    names = [place.removeprefix(f"{kinds[0]}.") if short else place for place in shown.places]
    return lines(
        series,
        label=label,
        x_label="layer" if shown.kind == "site" else shown.kind,
        y_label=shown.unit,
        x_ticks=None if by_value else list(zip(xs, names)),
        marks=[(x, marks[place]) for x, place in zip(xs, shown.places) if place in marks],
        zero=zero,
    )


def strip(
    rows: Sequence[tuple[str, Sequence[float]]], *, label: str, x_label: str, marks: Sequence[tuple[float, str]] = ()
) -> Markup:
    """A strip plot: one named row of dots for each sample, and named upright lines through all of them."""
    values = [v for _, sample in rows for v in sample]
    if not any(map(finite, values)):
        return tag("p", f"{label}: {NOT_MEASURED}.", class_="empty")
    x0, x1 = spread([*values, *(x for x, _ in marks)])
    kept = [(x, text) for x, text in marks if finite(x)]
    row, top = 46, 10 + 15 * len(kept)
    bottom = top + row * len(rows)

    def px(x: float) -> float:
        return 8 + (WIDTH - 16) * (x - x0) / (x1 - x0)

    parts = [tag("title", label)]
    for i, (x, text) in enumerate(kept):
        side = "end" if px(x) > WIDTH * 0.5 else ""
        parts.append(tag("line", x1=px(x), x2=px(x), y1=6 + 15 * i, y2=bottom, class_="mark"))
        parts.append(
            tag("text", _cut(text, 34), x=px(x) + (-5 if side else 5), y=14 + 15 * i, class_=f"tick strong {side}")
        )
    for r, (name, sample) in enumerate(rows):
        y = top + row * r
        parts.append(tag("text", tag("title", name), _cut(name, 44), x=8, y=y + 14, class_="label"))
        parts.append(tag("line", x1=8, x2=WIDTH - 8, y1=y + 30, y2=y + 30, class_="grid"))
        for i, v in enumerate(sample):
            if finite(v):
                # The golden ratio scatters neighbors apart, the same way every time.
                dy = ((i * 0.618034) % 1 - 0.5) * 12
                parts.append(
                    tag(
                        "circle",
                        tag("title", f"{name}: {number(float(v))}"),
                        cx=px(v),
                        cy=y + 30 + dy,
                        r=3,
                        class_="dot null",
                    )
                )
    for x in ticks(x0, x1):
        parts.append(tag("text", _tick(x), x=px(x), y=bottom + 14, class_="tick mid"))
    parts.append(tag("text", x_label, x=WIDTH - 8, y=bottom + 32, class_="label end"))
    return _chart(parts, bottom + 38, label)


def bars(rows: Sequence[tuple[str, float, float]], *, label: str, x_label: str) -> Markup:
    """One named bar a row from zero to its value, and an upright line at what it is held against."""
    x1 = spread([v for _, *values in rows for v in values])[1]
    row, top, bottom = 30, 6, 6 + 30 * len(rows)

    def px(x: float) -> float:
        return 8 + (WIDTH - 16) * x / x1

    parts = [tag("title", label)]
    for r, (name, value, against) in enumerate(rows):
        y = top + row * r
        parts.append(tag("text", _cut(name, 44), x=8, y=y + 11, class_="label"))
        told = tag("title", f"{name}: {number(value)}, held against {number(against)}")
        parts.append(tag("rect", told, x=8, y=y + 15, width=px(value) - 8, height=9, class_="fill null"))
        parts.append(tag("line", x1=px(against), x2=px(against), y1=y + 12, y2=y + 27, class_="control"))
    for x in ticks(0.0, x1):
        parts.append(tag("text", _tick(x), x=px(x), y=bottom + 14, class_="tick mid"))
    parts.append(tag("text", x_label, x=WIDTH - 8, y=bottom + 32, class_="label end"))
    return _chart(parts, bottom + 38, label)


def balance(share: float) -> Markup:
    """Where a change belongs, on a line from base (left, 0) over both (1/2) to tuned (right, 1)."""
    label = f"share {number(share)}: 0 is base only, 0.5 both alike, 1 tuned only"
    parts = [
        tag("title", label),
        tag("line", x1=4, x2=60, y1=7, y2=7, class_="line base"),
        tag("line", x1=60, x2=116, y1=7, y2=7, class_="line tuned"),
        tag("line", x1=60, x2=60, y1=3, y2=11, class_="axis"),
    ]
    if finite(share):
        tone = "tuned" if share >= 0.5 else "base"
        parts.append(tag("circle", cx=4 + 112 * min(1.0, max(0.0, share)), cy=7, r=4.5, class_=f"dot {tone}"))
    return tag("svg", *parts, class_="balance", viewBox="0 0 120 14", role="img", aria_label=label)


def _runs(points: Iterable[Point]) -> Iterator[list[Point]]:
    """Stretches of points of which every coordinate is finite."""
    for whole, run in groupby(points, key=lambda point: all(map(finite, point))):
        if whole:
            yield list(run)


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _legend(series: Sequence[Line]) -> list[Markup]:
    x, parts = 0.0, []
    for s in series:
        parts.append(tag("line", x1=x, x2=x + 14, y1=9, y2=9, class_=f"line {s.tone}{' dashed' * s.dashed}"))
        if s.band:
            parts.append(tag("rect", x=x, y=4, width=14, height=10, class_=f"band {s.tone}"))
        parts.append(tag("text", _cut(s.name, 30), x=x + 19, y=13, class_="tick"))
        x += 19 + 6.2 * min(len(s.name), 30) + 14
    return parts


def _chart(parts: Sequence[Markup], height: float, label: str) -> Markup:
    return tag(
        "svg", *parts, class_="chart", viewBox=f"0 0 {WIDTH} {_plain(float(height))}", role="img", aria_label=label
    )


def _path(points: Sequence[tuple[float, float]], px: Any, py: Any) -> str:
    return " ".join(f"{_plain(float(px(x)))},{_plain(float(py(y)))}" for x, y in points)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


STYLE = (
    "svg{background:#fff} text{font:12px system-ui,sans-serif;fill:#1c2126} .tick{font-size:11px;fill:#555e67} .end{text-anchor:end} "
    ".mid{text-anchor:middle} .grid{stroke:#dfe2e5} .axis,.mark{stroke:#7d868e} .mark{stroke-dasharray:3 2} "
    ".dot.null{fill:#1f66a8;opacity:.65} .line{fill:none;stroke:#1c2126;stroke-width:1.6} .line.null{stroke:#1f66a8} .dashed{stroke-dasharray:4 3} "
    ".fill.null{fill:#1f66a8;opacity:.65} .control{stroke:#1c2126;stroke-width:2}"
)


def alone(chart: Markup) -> str:
    """A chart as a file of its own, with the few styles it needs, twice as wide on a page."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{2 * WIDTH}"'
    return str(chart).replace("<svg", head, 1).replace(">", f"><style>{STYLE}</style>", 1) + "\n"
