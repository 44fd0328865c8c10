"""Write the benchmark's page: tables of scores as Markdown, and charts as SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from tunediff.lab.score_tables import Row, against, by_method, content, detection, dictionaries, stability, undoing
from tunediff.lab.scores import (
    DEFAULT_METHOD,
    FIRST,
    SIGNALS,
    STATISTICS,
    Cell,
    bound_for,
    identified,
    is_placebo,
    own_and_decoys,
    roc,
    shares,
    split,
)
from tunediff.reports.charts import Line, alone, lines, strip


def render(cells: Sequence[Cell], vectors: Mapping[str, Tensor], command: str) -> str:
    """The page as Markdown: all tables of scores, and each method's result on each fine-tuned model.

    vectors   unit vectors (K, D) of each cell's top-ranked changes, by the cell's key
    command   the command line that the page quotes
    """
    methods, names = (list(dict.fromkeys(getattr(c, part) for c in cells)) for part in ("method", "tune"))
    real = [name for name in names if not next(c for c in cells if c.tune == name).is_null]

    def by(rows: Sequence[str], columns: Sequence[str], say: Callable[[Cell], str], **which: str) -> list[str]:
        ((row_is, column_is),) = which.items()
        return _markdown(
            [
                {
                    row_is: row,
                    **{
                        column: ", ".join(
                            say(c) for c in cells if getattr(c, row_is) == row and getattr(c, column_is) == column
                        )
                        or "not run"
                        for column in columns
                    },
                }
                for row in rows
            ]
        )

    parts = {
        f"Made by `{command}` ([what the columns are](bench.md)); every cell is in `bench.json`. Means are over the fine-tunes "
        "and seeds that were run, with 95 % intervals over them. They do not compare methods that ran on different fine-tunes.": [],
        "## Is there anything?": [
            *_markdown([{"method": m, **detection(mine)} for m, mine in by_method(cells)]),
            "",
            "![Best score of each run](benchmark-scores.svg)",
            "",
            "![Largest gap of each run](benchmark-gaps.svg)",
            "",
            "![Detect or abstain](benchmark-roc.svg)",
        ],
        "## What is it?": [
            *_markdown([{"method": m, **content(mine)} for m, mine in by_method(cells)]),
            "",
            "![Planted words read out](benchmark-words.svg)",
        ],
        "## Can it be taken out?\n\nShares of held-out answers that show a behavior, mean over fine-tunes. The first change "
        "that names an unwanted behavior is removed. Where none does, it is the first confirmed change that does not name the "
        "wanted one. It is removed as strongly as 0.02 nat a token on neutral text allows. *Random*: random directions of equal "
        "energy. *Scaled*: the whole fine-tune scaled down, as far as 0.02 nat allows.": _markdown(undoing(cells)),
        "## Against BatchTopK\n\nDifferences on the same fine-tune and seed, at the same 24 latents a token where k is a setting; an "
        "interval that excludes 0 is a difference.": _markdown(against(cells)),
        "## Do two runs agree?\n\nTwo seeds of one fine-tune, against runs on two fine-tunes.": _markdown(
            stability(cells, vectors)
        ),
        "## What does it cost?": _markdown(dictionaries(cells)),
        "## Tune by tune\n\n*Named*: every behavior is named by a confirmed change among the first five (by the table, for "
        "signals without a test). *Part*: some are. *Found*: something is confirmed. A dash: nothing is. One entry a seed.": by(
            methods, names, _said, method="tune"
        ),
        "## Which tune is it?\n\nThe organism whose planted words are the largest share of what the first five confirmed changes "
        "promote, by method.": by(real, methods, lambda c: identified(c) or "–", tune="method"),
    }
    return "\n".join(
        [
            "# Benchmark",
            "",
            *(line for title, lines in parts.items() for line in (title, "", *lines, *([""] if lines else []))),
        ]
    )


def _said(cell: Cell) -> str:
    named = [bool(ids) for ids in cell.named.values()]
    if named and any(named):
        return "named" if all(named) else "part"
    return "found" if cell.confirmed else "–"


def _markdown(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return ["Not run."]
    return [
        "| " + " | ".join(rows[0]) + " |",
        "|" + "---|" * len(rows[0]),
        *("| " + " | ".join(row.values()) + " |" for row in rows),
    ]


def charts(cells: Sequence[Cell]) -> dict[str, str]:
    """Charts as SVG, by file name: scores of fine-tunes and nulls, gaps between models, and planted words read out."""
    detected, apart, words = [], [], []
    for method, mine in by_method(cells):
        for name, part in zip(("tunes", "nulls"), split([c for c in mine if c.p == c.p and c.method not in SIGNALS])):
            if part:
                detected.append(
                    (f"{method}: {name}", [math.log10(max(c.score, 1e-3) / max(c.null, 1e-3)) for c in part])
                )
        for name, of in (("tunes", lambda c: not c.is_null), ("placebos", is_placebo)):
            gaps = [math.log10(c.gap) for c in mine if of(c) and c.gap > 0]
            if gaps:
                apart.append((f"{method}: {name}", gaps))
        own_less_decoys = [
            own - decoy for c in mine if c.named for own, decoy in [own_and_decoys(shares(c.read[:FIRST]), c.tune)]
        ]
        if own_less_decoys:
            words.append((method, own_less_decoys))
    real, null = split([c for c in cells if c.method == DEFAULT_METHOD])
    curves = (
        [
            Line(f"default, by {by}", roc([of(c) for c in real], [of(c) for c in null]), tone)
            for (by, of), tone in zip(STATISTICS.items(), ("null", "ink"))
        ]
        if real and null
        else []
    )
    drawn = {
        "benchmark-roc.svg": lines(
            curves, label="Detect or abstain", x_label="share of nulls claimed", y_label="share of tunes found"
        ),
        "benchmark-scores.svg": strip(
            detected,
            label="Best score of each run",
            x_label="log10 of best score / 95th percentile of random tunes'",
            marks=[(0.0, "stands out from here on")],
        ),
        "benchmark-gaps.svg": strip(
            apart,
            label="Largest gap of each run",
            x_label="log10 of nat a token where a confirmed change is on",
            marks=_bounds(cells),
        ),
        "benchmark-words.svg": strip(
            words, label="Planted words read out", x_label="share of words promoted that were planted, less decoys'"
        ),
    }
    return {name: alone(chart) for name, chart in drawn.items()}


def _bounds(cells: Sequence[Cell]) -> list[tuple[float, str]]:
    """Mark of the default method's bound on the gap; empty if no placebos were run."""
    bound = next(
        (b for c in cells if c.method == DEFAULT_METHOD and not c.is_null and (b := bound_for(c, cells))), None
    )
    return [(math.log10(bound), "one more placebo stays below")] if bound else []
