"""The terminal's summary: a `Diff` in at most 49 lines."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from tunediff.core.text import NOT_MEASURED, finite, interval, number, one_line, quantity, seconds, token_text
from tunediff.records.diff import Bill, ChangeRecord, Diff
from tunediff.records.measure import Measure
from tunediff.reports.sentences import apart, asked_for, example, form, related, shown_by, tally, title, verdict

MOST_ITEMS = 3
"""Most lines of a list, the line that counts the rest included."""
MOST_FINDINGS = 3
"""Most findings that are told, each in three lines."""
MOST_CHANGES = 5
"""Most rows of the table of changes, the line that counts the rest included."""

T = TypeVar("T")
Part = str | tuple[str, str]
"""A piece of a line: text, or text and its style."""


def summary_table(diff: Diff) -> RenderableType:
    """The result for the terminal, in at most 49 lines: verdict, how the models relate, findings, output shift, ranking, bills,
    not found, times.

    Strings of the record are never read as markup, and control characters in them are shown, not sent. Lines that do
    not fit the width end in an ellipsis.
    """
    spent = ", ".join(f"{s.name} {seconds(s.seconds)}" for s in diff.stages)
    return Group(
        _line((verdict(diff), "bold"), ("  ·  " + tally(diff), "dim")),
        _line(("base  ", "bright_blue"), diff.base.name, ("    tuned  ", "dark_orange"), diff.tuned.name),
        *([] if diff.relation is None else [_line(told) for told in related(diff.relation)[:MOST_ITEMS]]),
        *([_line(("chats in  ", "dim"), form(diff.template))] if diff.template else []),
        *_findings(diff),
        *_list("Output shift", [_output(m) for m in diff.output], NOT_MEASURED),
        *_ranking(sorted(diff.changes, key=lambda c: c.rank)),
        *_list("What undoing costs", [_bill(b) for b in diff.bills], "nothing was undone"),
        *_read(diff),
        *_list("Not found", [_line(n) for n in diff.not_found], "nothing listed"),
        _line(("Stages  ", "bold"), spent or "none recorded"),
    )


def _read(diff: Diff) -> list[RenderableType]:
    """What was left out or changed where text was read, in one line; none where nothing was."""
    remarks = [*diff.corpus.remarks, *diff.corpus.prompt_remarks]
    told = "; ".join(f"{remark.what}: {number(remark.count)}" for remark in remarks)
    return [_line(("Text  ", "bold"), told)] if told else []


def _line(*parts: Part) -> Text:
    clean = [(one_line(p), "") if isinstance(p, str) else (one_line(p[0]), p[1]) for p in parts]
    return Text.assemble(*clean, no_wrap=True, overflow="ellipsis")


def _list(title: str, items: Sequence[Text], empty: str) -> list[RenderableType]:
    kept, rest = _first(items or [_line((empty, "dim"))], MOST_ITEMS)
    more = [_line((f"… and {rest} more", "dim"))] if rest else []
    return [_line((title, "bold")), *(Padding(item, (0, 0, 0, 2), expand=False) for item in (*kept, *more))]


def _first(items: Sequence[T], most: int) -> tuple[Sequence[T], int]:
    """The items to show in `most` lines, and how many are left out."""
    kept = items if len(items) <= most else items[: most - 1]
    return kept, len(items) - len(kept)


def _output(m: Measure) -> Text:
    bounds = f" {interval(m.low, m.high)}" if finite(m.low) or finite(m.high) else ""
    control = f"control {number(m.control)}" if m.control is not None else "no control"
    against = f" ({m.against})" if m.against else ""
    return _line(f"{m.name}  ", (quantity(m.value, m.unit), "bold"), f"{bounds}  ", (control + against, "dim"))


def _findings(diff: Diff) -> list[RenderableType]:
    """Findings in three lines each: what tuned says and where, one of its answers, how far apart the models are."""
    conditions = {condition.asked: condition for condition in diff.elicited}
    shown: list[RenderableType] = [_line(("Findings", "bold"))] if diff.findings else []
    for place, finding in enumerate(diff.findings[:MOST_FINDINGS], start=1):
        asked = asked_for(finding, conditions)
        shown.append(_line(f"{place:>2}  ", (title(finding), "bold"), f"  {asked}" if asked else ""))
        if answer := example(finding, conditions):
            shown.append(_line("    ", (f"{answer.question!r}  ", "dim"), answer.tuned))
        shown.append(_line("    ", ("; ".join(filter(None, (apart(finding, conditions), shown_by(finding)))), "dim")))
    rest = len(diff.findings) - MOST_FINDINGS
    return [*shown, *([_line((f"    … and {rest} more in the report", "dim"))] if rest > 0 else [])]


def _bill(bill: Bill) -> Text:
    done = [bill.operation] if bill.operation != bill.name else []
    removed = ["removes " + ", ".join(bill.changes)] if bill.changes else []
    parts: list[Part] = [(bill.name, "bold"), "".join(f"  {told}" for told in (*done, *removed)) + "  "]
    if bill.failed:
        parts.append(f"no bill: {bill.failed}")
    for m in bill.measures:
        control = f" ({_versus(m, 'control')})" if m.control is not None else ""
        parts += [f"{m.name} ", (quantity(m.value, m.unit), "bold"), (control, "dim"), "  "]
    return _line(*parts)


def _ranking(ranked: Sequence[ChangeRecord]) -> list[RenderableType]:
    if not ranked:
        return []
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=0, header_style="bold")
    # Where it is narrow, names and tokens give way, numbers do not.
    table.add_column("#", justify="right", no_wrap=True, min_width=2)
    table.add_column("change", overflow="ellipsis", min_width=13, max_width=28)
    table.add_column("decision", no_wrap=True, min_width=10)
    table.add_column("score, null", no_wrap=True, min_width=13, max_width=24)
    table.add_column("necessity", no_wrap=True, min_width=9, max_width=16)
    table.add_column("sufficiency", no_wrap=True, min_width=11, max_width=16)
    table.add_column("promotes", overflow="ellipsis", min_width=6, max_width=28)
    kept, rest = _first(ranked, MOST_CHANGES)
    for change in kept:
        table.add_row(*_row(change))
    return [table, *([_line((f"  … and {rest} more in the report", "dim"))] if rest else [])]


def _row(c: ChangeRecord) -> list[str | Text]:
    style = "bold" if c.decision == "confirmed" else "dim"
    bounds = interval(c.score.low, c.score.high) if finite(c.score.low) or finite(c.score.high) else ""
    top = [token_text(w.token) for w in (c.promoted or c.suppressed)[:4]]
    less = "less " if top and not c.promoted else ""
    tried = [_named(c.measures, name) for name in ("necessity", "sufficiency")]
    return [
        str(c.rank),
        _cell(_line((c.id, style)), _line((", ".join(c.sites), "dim"))),
        _cell(_line((c.decision, style)), _line((f"share {c.share:.2f}" if finite(c.share) else "", "dim"))),
        _cell(_line(number(c.score.value), (f"  {_versus(c.score, 'vs')}", "dim")), _line((bounds, "dim"))),
        *(
            _cell(_line(number(m.value) if m else "not tried"), _line((_versus(m, "vs") if m else "", "dim")))
            for m in tried
        ),
        _cell(_line(less + " ".join(top[:2]) or "—"), _line(" ".join(top[2:]))),
    ]


def _cell(first: Text, second: Text) -> Text:
    """Two lines that may be cut but not wrapped."""
    return Text("\n", no_wrap=True, overflow="ellipsis").join([first, second])


def _named(measures: Iterable[Measure], name: str) -> Measure | None:
    return next((m for m in measures if name in m.name.lower()), None)


def _versus(m: Measure, word: str) -> str:
    return "no control" if m.control is None else f"{word} {number(m.control)}"
