"""The report: a `Diff` as one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import hashlib
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunediff.core.artifacts import to_json
from tunediff.core.axes import WRITERS
from tunediff.core.disk import update_bytes
from tunediff.core.text import (
    NOT_MEASURED,
    finite,
    interval,
    number,
    one_line,
    percent,
    quantity,
    seconds,
    token_text,
    visible,
)
from tunediff.records.diff import ChangeRecord, Diff, FitCard
from tunediff.records.measure import Context, Measure
from tunediff.records.profile import Profile
from tunediff.records.scan import Scan
from tunediff.reports.charts import Line, balance, bar, lines, profile, spread, strip, tag
from tunediff.reports.sentences import carrying, form, related, tally, title, verdict

if TYPE_CHECKING:
    from markupsafe import Markup

ASSETS = Path(__file__).parent / "assets"
KL_STEPS = (0.1, 0.5, 1.0, 2.0)
"""Where the underline of a token grows thicker, in nat."""
STRENGTH_STEPS = 8


def write_report(diff: Diff, path: Path) -> None:
    """Write the whole finding as one HTML file that opens from disk without a network.

    Nothing is loaded from anywhere, and the page's content security policy forbids it: style and script are named by
    their hashes. The page can be read without the script. All strings of the record count as hostile: they are
    escaped, and characters that hide or reorder text are written out. The same record gives the same bytes.
    """
    update_bytes(Path(path), render_report(diff).encode("utf-8"))


def render_report(diff: Diff) -> str:
    """The page `write_report` writes, as a string."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(ASSETS),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        number=number, token=token_text, percent=percent, seconds=seconds, cell=_cell, magnitude=_magnitude
    )
    style, script = (Markup((ASSETS / name).read_text(encoding="utf-8")) for name in ("report.css", "report.js"))
    changes = sorted(diff.changes, key=lambda change: change.rank)
    low, high = spread([v for c in changes for v in (c.score.value, c.score.low, c.score.high, c.score.control)])
    # Below 0 there is nothing to compare: a latent that is wrong on unseen text must not squeeze all others.
    extent = (max(low, -0.1 * high) if high > 0 else low, high)
    page = environment.get_template("report.html.j2").render(
        diff=diff,
        verdict=verdict(diff),
        tally=tally(diff),
        related=[] if diff.relation is None else related(diff.relation),
        changes=changes,
        conditions={condition.asked: condition for condition in diff.elicited},
        rank_of={c.id: c.rank for c in changes},
        title=title,
        carrying=carrying,
        told=[c for c in changes if c.decision == "confirmed"],
        folded=[c for c in changes if c.decision != "confirmed"],
        style=style,
        script=script,
        style_hash=_hash(style),
        script_hash=_hash(script),
        scores={
            c.rank: bar(c.score.value, c.score.low, c.score.high, c.score.control, extent=extent, label=_told(c.score))
            for c in changes
        },
        score_extent=extent,
        rows=measure_rows,
        balance=balance,
        scan_charts=scan_charts,
        scan_rows=scan_rows,
        depth_chart=depth_chart,
        dose_chart=dose_chart,
        fit_charts=fit_charts,
        null_chart=null_chart,
        share_rows=share_rows,
        weight_rows=weight_rows,
        passage=passage,
        strongest=strongest,
        corpus_contexts=corpus_contexts,
        completions=completions,
        flat=flat,
        form=form,
        interval=interval,
        total=sum(s.seconds for s in diff.stages if finite(s.seconds)),
    )
    return visible(page)


# ── tables ──────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Row:
    """A measure as a table shows it: all text but the bar, which shares its scale with the rows of equal unit."""

    name: str
    bar: Markup
    value: str
    interval: str
    control: str
    against: str
    p: str


def measure_rows(measures: Sequence[Measure]) -> list[Row]:
    """Measures as rows of a table, each with a bar; rows of one unit share a scale."""
    rows = []
    for m in measures:
        peers = [v for n in measures if n.unit == m.unit for v in (n.value, n.low, n.high, n.control)]
        rows.append(
            Row(
                name=m.name,
                bar=bar(m.value, m.low, m.high, m.control, extent=spread(peers), label=_told(m)),
                value=quantity(m.value, m.unit),
                interval=interval(m.low, m.high),
                control="none" if m.control is None else number(m.control),
                against=m.against,
                p=_p(m.p),
            )
        )
    return rows


def scan_rows(scan: Scan) -> list[tuple[str, float, float, float, float]]:
    """Each scanned site with its relative difference, noise floor, constant offset and ceiling."""
    columns = (scan.relative.values[0], scan.noise, scan.offset.values[0], scan.ceiling.values[0])
    return list(zip(scan.sites, *columns, strict=True))


def share_rows(shares: Mapping[str, float]) -> list[tuple[str, Markup, str]]:
    """Named shares, largest first, as name, bar and percent; all bars run from 0 to the largest."""
    order = sorted(shares.items(), key=lambda item: (-item[1] if finite(item[1]) else math.inf, item[0]))
    extent = spread(list(shares.values()))
    return [(name, bar(v, extent=extent, label=f"{name}: {percent(v)}"), percent(v)) for name, v in order]


def weight_rows(change: ChangeRecord) -> tuple[list[tuple[str, Markup, str]], list[tuple[str, Markup, str]]]:
    """The tokens a change makes less likely, bars growing left, and those it makes more likely, growing right."""
    extent = spread([abs(w.weight) for w in (*change.promoted, *change.suppressed) if finite(w.weight)])
    less, more = (
        [
            (
                token_text(w.token),
                bar(
                    abs(w.weight),
                    extent=extent,
                    tone=tone,
                    mirrored=tone == "base",
                    label=f"{token_text(w.token)}: {number(w.weight)}",
                ),
                number(w.weight),
            )
            for w in weights
        ]
        for weights, tone in ((change.suppressed, "base"), (change.promoted, "tuned"))
    )
    return less, more


def flat(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as sorted (dotted key, value) rows, values written as TOML writes them."""
    rows: list[tuple[str, str]] = []
    for key, value in sorted(settings.items()):
        if isinstance(value, Mapping) and value:
            rows += flat(value, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", "(default)" if value is None else to_json(value)))
    return rows


def _told(m: Measure) -> str:
    told = f"{m.name}: {quantity(m.value, m.unit)}"
    if finite(m.low) or finite(m.high):
        told += f", interval {interval(m.low, m.high)}"
    return told + (f", control {number(m.control)}" if m.control is not None else "")


def _p(p: float | None) -> str:
    if p is None:
        return "—"
    return "< 0.001" if p < 0.001 else f"{p:.2g}" if finite(p) else NOT_MEASURED


def _cell(value: Any) -> str:
    """A cell of an evidence table: numbers as numbers, text as tokens, everything else as JSON."""
    if isinstance(value, str):
        return token_text(value)
    if value is None or isinstance(value, (bool, int, float)):
        return number(value)
    return to_json(value)


def _magnitude(count: int) -> str:
    """A large count in short, e.g. ``135 M``."""
    for size, sign in ((10**12, "T"), (10**9, "B"), (10**6, "M")):
        if count >= size:
            return f"{count / size:.3g} {sign}"
    return number(count)


# ── text a change is on in ──────────────────────────────────────────────────────────────────────────────────


def strongest(change: ChangeRecord) -> float:
    """The largest absolute strength in all of a change's contexts; 1 if there is none."""
    return max((abs(s) for c in change.contexts for s in c.strengths if finite(s)), default=1.0) or 1.0


def passage(context: Context, top: float) -> Markup:
    """A context's text: background by strength as a share of `top`, underline by KL; both written in the tooltip."""
    from markupsafe import Markup, escape

    parts = []
    for token, strength, kl in itertools.zip_longest(context.tokens, context.strengths, context.kl):
        if token is None:
            break
        text = token_text(token) if not token.strip() else one_line(token)
        ends_line = Markup("<br>") if "\n" in token else ""
        level = math.ceil(STRENGTH_STEPS * min(1.0, abs(strength) / top)) if finite(strength) else 0
        thick = sum(kl >= step for step in KL_STEPS) if finite(kl) else 0
        if not level and not thick:
            parts += [tag("i", text, class_="ws") if not token.strip() else escape(text), ends_line]
            continue
        classes = [f"s{level}"] * bool(level) + ["minus"] * bool(level and strength < 0) + [f"k{thick}"] * bool(thick)
        told = f"{token_text(token)}  strength {number(strength)}, KL {quantity(kl, 'nat')}"
        # One leading space stays outside, so that an underline does not hang at the end of a wrapped line.
        lead = " " if text.startswith(" ") and len(text) > 1 else ""
        parts += [lead, tag("span", text[len(lead) :], class_=" ".join(classes), title=told), ends_line]
    return Markup("").join(parts)


def corpus_contexts(change: ChangeRecord) -> list[Context]:
    """The contexts no model wrote."""
    return [c for c in change.contexts if c.writer not in WRITERS]


def completions(change: ChangeRecord) -> list[tuple[str, str, Context | None, Context | None]]:
    """What the models wrote, as (prompt, kind, by base, by tuned), paired by prompt in order of appearance; what tuned
    wrote amplified is on its side."""
    groups: dict[tuple[str, str], tuple[list[Context], list[Context]]] = {}
    for c in change.contexts:
        if c.writer in WRITERS:
            groups.setdefault((c.document.removesuffix(f"/{c.writer}"), c.kind), ([], []))[c.writer != "base"].append(c)
    return [(*key, base, tuned) for key, sides in groups.items() for base, tuned in itertools.zip_longest(*sides)]


# ── charts ──────────────────────────────────────────────────────────────────────────────────────────────────


def scan_charts(scan: Scan) -> list[tuple[str, Markup]]:
    """The scan over depth: relative difference over its noise floor, share of constant offset, and ceiling."""
    marks = {site: f"chosen: {site}" for site in scan.chosen}
    profiles = [scan.relative, scan.offset, scan.ceiling]
    return [(p.name, profile(p, label=f"{p.name} by layer", marks=marks)) for p in profiles]


def depth_chart(change: ChangeRecord, depth: Profile) -> Markup:
    """Layer by layer, the share of the difference that goes along with the change."""
    marks = {site: f"read at {site}" for site in change.sites}
    return profile(depth, label=f"Depth profile of change {change.rank}", marks=marks)


def dose_chart(change: ChangeRecord) -> Markup:
    """Effect against dose, over the 5-95 % band of random directions of equal length."""
    points = sorted(change.dose, key=lambda d: d.dose)
    return lines(
        [
            Line(
                "random directions",
                [(d.dose, d.control) for d in points],
                "null",
                dashed=True,
                band=[(d.dose, d.control_low, d.control_high) for d in points],
            ),
            Line("this change", [(d.dose, d.effect) for d in points]),
        ],
        label=f"Dose curve of change {change.rank}",
        x_label="dose, in units of the change's own size",
        y_label="effect",
    )


def fit_charts(fit: FitCard) -> list[tuple[str, Markup]]:
    """The training curve, a chart for each of its columns."""
    if fit.curve is None:
        return []
    return [
        (column, profile(fit.curve.only([column]), label=f"{column} against {fit.curve.kind}", zero=False))
        for column in fit.curve.subjects
    ]


def null_chart(diff: Diff) -> Markup:
    """The best score of every null draw, with the scores of the confirmed changes, or of the best, as lines."""
    ranked = sorted(diff.changes, key=lambda c: c.rank)
    shown = ([c for c in ranked if c.decision == "confirmed"] or ranked[:1])[:4]
    marks = [(c.score.value, f"{c.rank} {c.id}: {number(c.score.value)}") for c in shown if c.score.value is not None]
    unit = next((f"{c.score.name}{f', {c.score.unit}' if c.score.unit else ''}" for c in ranked), "score")
    return strip(
        [(f"{n.name} ({len(n.statistics)} draws)", n.statistics) for n in diff.nulls],
        label="Best score of every null draw",
        x_label=unit,
        marks=marks,
    )


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
