"""Tables of the bench's scores: one row a method, every number beside its null or control, as text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations

from torch import Tensor

from tunediff.core.chance import Interval, bootstrap_mean, proportion
from tunediff.lab.scores import (
    FIRST,
    PAIRED,
    SAME,
    SIGNALS,
    STATISTICS,
    Cell,
    Undone,
    as_told,
    behaviors_of,
    bound_for,
    family,
    identified,
    jaccard,
    matched,
    own_and_decoys,
    roc_area,
    shares,
    split,
)

Row = dict[str, str]
"""Column -> text; the rows of a table have the same columns."""


def table(cells: Sequence[Cell]) -> list[Row]:
    """One row a method, in short: found on tunes, claimed on nulls, named, told which tune, undone, cost."""
    return [
        {
            "method": method,
            **detection(mine),
            **content(mine),
            "unwanted left": _left((c.undone for c in mine if c.undone is not None), wanted=False)["after"],
            "seconds": _mean([c.seconds for c in mine]),
        }
        for method, mine in by_method(cells)
    ]


def by_method(cells: Sequence[Cell]) -> list[tuple[str, list[Cell]]]:
    """Each method with its cells, in order of first appearance."""
    return [(method, [c for c in cells if c.method == method]) for method in dict.fromkeys(c.method for c in cells)]


def detection(cells: Sequence[Cell]) -> Row:
    """Is there anything: models found, nulls claimed, both above placebos too, and the areas under the ROC curve."""
    real, null = split([c for c in cells if c.p == c.p])
    none = "not run" if real else "no test"
    row = {
        "tunes found": _share([bool(c.confirmed) for c in real], "no test"),
        "nulls claimed": _share([bool(c.confirmed) for c in null], none),
    }
    tried = [c for c in cells if c.method not in SIGNALS]  # a table has no gap
    for side, part in zip(("found", "claimed"), split(tried)):
        above = [
            c.gap > bound
            for c in part
            if len(c.gaps) == len(c.confirmed)
            for bound in [bound_for(c, cells)]
            if bound is not None
        ]
        row[f"{side} above placebos"] = _share(above, none if tried else "no gap")
    for by, of in STATISTICS.items():
        area = roc_area([of(c) for c in real], [of(c) for c in null])
        row[f"ROC area by {by}"] = "no gap" if by == "gap" and not tried else _interval(area) if real and null else none
    return row


def content(cells: Sequence[Cell]) -> Row:
    """What is it: behaviors named, organisms identified, planted words promoted beside those of other organisms."""
    real = [c for c in cells if c.named]
    twenty, hundred, slots = (
        [own_and_decoys(found, c.tune) for c in real for found in [of(c)] if found]
        for of in (lambda c: shares(c.read[:1]), lambda c: shares(c.read[:FIRST]), lambda c: c.slots)
    )
    return {
        "behaviors named": _share([bool(ids) for c in real for ids in c.named.values()]),
        "by a finding (decoys)": _as_told(real),
        "tune identified": _share([identified(c) == family(c.tune) for c in real]),
        "words@20 (decoys)": _beside(twenty),
        "words@100 (decoys)": _beside(hundred),
        "slots (decoys)": _beside(slots),
    }


def _as_told(cells: Sequence[Cell]) -> str:
    """Share of behaviors that a finding's words name, and of behaviors of other organisms that they name, too."""
    counted = [as_told(cell) for cell in cells if cell.told]
    mine, decoys = (
        ([named for one in some for named in one] for some in zip(*counted, strict=True)) if counted else ([], [])
    )
    return f"{_share(mine)} ({_share(decoys)})" if mine else "not run"


def _left(undone: Iterable[Undone], wanted: bool) -> Row:
    """Mean rates of behaviors of one sort before, after, under random directions and with the tune scaled down; a tune of
    which nothing was taken out keeps what it had."""
    sort = behaviors_of(wanted)
    sides: dict[str, list[float]] = {"before": [], "after": [], "random": [], "scaled": []}
    for one in undone:
        for side, values in sides.items():
            values += [rate for name, rate in getattr(one, side).items() if name in sort]
    return {side: _mean(values) or "not run" for side, values in sides.items()}


def undoing(cells: Sequence[Cell]) -> list[Row]:
    """One row a method: what is left of unwanted and of wanted behaviors, beside random directions, and the cost.

    A second row is of whole findings in place of changes, where they were taken out.
    """
    rows = []
    for method, mine in by_method(cells):
        for what, undone in (
            (method, [c.undone for c in mine if c.undone is not None]),
            (f"{method}, findings", [c.undone_told for c in mine if c.undone_told is not None]),
        ):
            if undone:
                row: Row = {"method": what, "tunes": str(len(undone))}
                for label, wanted in (("unwanted", False), ("wanted", True)):
                    row |= {f"{label} {side}": text for side, text in _left(undone, wanted).items()}
                taken = {
                    "taken out": _mean([float(len(u.ids)) for u in undone]),
                    "cost": _mean([u.cost for u in undone]),
                }
                rows.append(row | taken)
    return rows


def stability(cells: Sequence[Cell], vectors: Mapping[str, Tensor]) -> list[Row]:
    """One row a method: how far two seeds of the whole run agree on one tune, beside how far runs on two tunes do."""
    rows = []
    for method, mine in by_method([c for c in cells if not c.is_null]):
        pairs = list(combinations(mine, 2))
        same = [(a, b) for a, b in pairs if a.tune == b.tune]
        other = [(a, b) for a, b in pairs if family(a.tune) != family(b.tune)]
        if same:

            def agree(of: Callable[[Cell, Cell], float]) -> str:
                return " against ".join(
                    _mean([v for a, b in some if (v := of(a, b)) == v]) or "not run" for some in (same, other)
                )

            rows.append(
                {
                    "method": method,
                    "pairs of runs": str(len(same)),
                    f"first 20 vectors matched (cosine > {SAME})": agree(
                        lambda a, b: (
                            matched(vectors[a.key], vectors[b.key]) if {a.key, b.key} <= set(vectors) else float("nan")
                        )
                    ),
                    "tokens in common (Jaccard@100)": agree(lambda a, b: jaccard(a.read, b.read)),
                }
            )
    return rows


def against(cells: Sequence[Cell], other: str = "batchtopk") -> list[Row]:
    """One row a method: its measures less those of `other` on the same tune and seed, mean with an interval over these pairs."""
    base = {(c.tune, c.seed): c for c in cells if c.method == other and not c.is_null}
    rows = []
    for method, mine in by_method(cells):
        pairs = [(c, base[c.tune, c.seed]) for c in mine if (c.tune, c.seed) in base] if method != other else []
        if pairs:
            gaps = {
                name: [a - b for one, two in pairs if (a := of(one)) is not None and (b := of(two)) is not None]
                for name, of in PAIRED.items()
            }
            rows.append(
                {
                    "method": method,
                    "pairs": str(len(pairs)),
                    **{name: _mean(values, sign="+") or "–" for name, values in gaps.items()},
                }
            )
    return rows


def dictionaries(cells: Sequence[Cell]) -> list[Row]:
    """One row a method: how well its dictionary fits, its candidates, and what it costs."""
    rows = []
    for method, mine in by_method(cells):
        fitted = [c for c in mine if c.ev_delta is not None and not c.is_null]
        row = {
            "method": method,
            **{
                label: _mean([value for c in fitted if (value := getattr(c, name)) is not None]) or "–"
                for label, name in (("EV of difference", "ev_delta"), ("L0", "l0"), ("dead", "dead"))
            },
        }
        rows.append(
            row
            | {
                "candidates": _mean([float(c.candidates) for c in mine]),
                "seconds": _mean([c.seconds for c in mine]),
                "peak memory, MiB": f"{max(c.memory for c in mine):,.0f}",
            }
        )
    return rows


def _share(values: Sequence[bool], none: str = "not run") -> str:
    if not values:
        return none
    share = proportion(sum(values), len(values))
    return f"{sum(values)}/{len(values)} [{share.low:.0%}, {share.high:.0%}]"


def _interval(value: Interval, sign: str = "") -> str:
    return f"{value.value:{sign}.2f} [{value.low:{sign}.2f}, {value.high:{sign}.2f}]"


def _mean(values: Sequence[float], sign: str = "") -> str:
    if not values:
        return ""
    mean = bootstrap_mean(values, seed=0)
    return _interval(mean, sign) if len(values) > 1 else f"{mean.value:{sign}.2f}"


def _beside(values: Sequence[tuple[float, float]]) -> str:
    return f"{_mean([own for own, _ in values])} ({sum(d for _, d in values) / len(values):.2f})" if values else "–"
