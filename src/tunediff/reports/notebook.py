"""The notebook's summary: a `Diff` as a short piece of HTML, every string escaped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from tunediff.core.text import interval, number, token_text, visible
from tunediff.records.diff import ChangeRecord, Diff
from tunediff.records.finding import Finding
from tunediff.reports.charts import tag
from tunediff.reports.sentences import apart, asked_for, shown_by, tally, title, verdict

SHOWN = 10
"""Most rows of the table of changes."""

TOKENS = 6
"""Most tokens shown for a change."""


def summary_html(diff: Diff) -> str:
    """The verdict, the two models, and the first changes with their decision, score, null and tokens."""
    changes = sorted(diff.changes, key=lambda c: c.rank)
    rest = len(changes) - SHOWN
    parts: list[Any] = [
        tag("p", tag("b", verdict(diff)), " · ", tally(diff)),
        tag("p", "base ", tag("code", diff.base.name), ", tuned ", tag("code", diff.tuned.name)),
        *([tag("ol", *(tag("li", _told(finding, diff)) for finding in diff.findings))] if diff.findings else []),
        _table(changes[:SHOWN]),
    ]
    if rest > 0:
        parts.append(tag("p", f"and {rest} more in .changes"))
    return str(tag("div", *parts))


def _told(finding: Finding, diff: Diff) -> str:
    """One finding in a line: what tuned says, where, and which changes show it."""
    known = {condition.asked: condition for condition in diff.elicited}
    parts = (title(finding), asked_for(finding, known), apart(finding, known), shown_by(finding))
    return visible("; ".join(filter(None, parts)))


def _table(changes: Sequence[ChangeRecord]) -> Markup:
    head = ("rank", "change", "decision", "score, x random tunes", "95 % interval", "null", "promotes")
    rows = [tag("tr", *(tag("th", name) for name in head)), *map(_row, changes)]
    return tag("table", *rows)


def _row(change: ChangeRecord) -> Markup:
    score = change.score
    promoted = " ".join(token_text(t.token) for t in change.promoted[:TOKENS])
    cells = (
        str(change.rank),
        change.id,
        change.decision,
        number(score.value),
        interval(score.low, score.high),
        number(score.control),
        promoted,
    )
    return tag("tr", *(tag("td", cell) for cell in cells))
