"""The bench: every method through the same evidence, on tunes whose truth is known and on nulls; resumable, one table."""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Iterable, Sequence

from tunediff import __version__, organisms, variants
from tunediff.artifacts import key_of, read_json, write_bytes, write_json
from tunediff.chance import Interval, bootstrap_mean, numpy_generator, proportion, quantile
from tunediff.demo import FIRST, naming
from tunediff.errors import SettingError
from tunediff.nulls import NULLS
from tunediff.organisms.base import Behavior
from tunediff.pairs import Pair
from tunediff.plans import Plan
from tunediff.results import ChangeRecord, typed
from tunediff.stages import DEMO, Progress, Run, quiet

TOKENS = 20
"""Tokens of a change's read-out that a share is taken of."""

SPARSE = ("batchtopk", "hybrid", "matryoshka", "dsf", "dfc", "diff_sae", "tuned_sae")
"""Dictionaries that are run at delta's total of 24 latents a token."""


def _crosscode(dictionary: str, *settings: str) -> tuple[str, ...]:
    return ('find.finders=["crosscode"]', f"find.dictionary={dictionary}", *settings)


METHODS: dict[str, tuple[str, ...]] = {
    "default": (),
    "delta": _crosscode("delta"),
    **{name: _crosscode(name, "dictionary.k=24.0") for name in SPARSE},
    "l1": _crosscode("l1"),
    "delta, lambda_delta 0": _crosscode("delta", "dictionary.lambda_delta=0.0"),
    "delta, plain text only": _crosscode("delta", "contrast.prompts=0"),
    **{name: (f'find.finders=["{name}"]',) for name in (
        "decision_clusters", "document_clusters", "mean_difference", "principal", "weight_spectrum", "random_directions")},
}
"""By name, the settings that make a run this method's. L1 has no k: its L0 is what its penalty makes it."""

QUICK = ("contrast.prompts=48", "contrast.pool=160", "corpus.tokens=1500", "fit.steps=150", "verify.draws=40", "verify.changes=3")
"""A budget of minutes: it shows that everything runs, not how good anything is."""


@dataclass(frozen=True)
class Tune:
    """One thing to be diffed: an organism's folder, or a null made from the demo's pair."""

    name: str
    source: str
    behaviors: tuple[Behavior, ...] = ()
    null: str = ""
    seed: int = 0


@dataclass(frozen=True)
class Cell:
    """What one method said of one tune.

    key          of the plan and the tune, so that a cell is run again only if it would differ
    p, score     the smallest p-value, and the best score in units of random tunes; ``null`` is their 95th percentile
    confirmed    ids of confirmed changes, in order
    named        behavior -> ids among the first five confirmed that name it by the organism's own test
    shares       organism -> share of the first tokens of the first five confirmed changes that are its planted words
    ev_delta, l0, dead   of the dictionary, where there is one
    seconds      of the method's own stages, found, ranked and tried; ``memory`` the process's peak so far, MiB
    """

    key: str
    tune: str
    is_null: bool
    method: str
    seed: int
    candidates: int
    p: float
    score: float
    null: float
    confirmed: list[str]
    named: dict[str, list[str]]
    shares: dict[str, float]
    ev_delta: float | None
    l0: float | None
    dead: float | None
    seconds: float
    memory: float


def tunes(folder: Path | None, nulls: Sequence[str] = (), base: str = "default") -> list[Tune]:
    """Every organism that `folder` holds by name, the one that ships where base is its own, and nulls, as NAME or NAME:SEED,
    made from the first of these."""
    ships = base == "default"
    found = [Tune("two-objectives", "demo", organisms.named("two-objectives").behaviors)] if ships else []
    for organism in organisms.every() if folder else ():
        if (organism.name != "two-objectives" or not ships) and (folder / organism.name / "card.json").is_file():
            found.append(Tune(organism.name, str(folder / organism.name), organism.behaviors))
    if not found:
        raise SettingError(f"there is no tune of {base}", expected="--tunes with folders named after organisms, each with its card.json",
                           remedy="tunediff organism make NAME TUNES/NAME")
    for text in nulls:
        name, _, seed = text.partition(":")
        if name not in NULLS or not (seed or "0").isdigit():
            raise SettingError(f"there is no null {text!r}", expected=", ".join(NULLS) + ", each with :SEED if wanted")
        found.append(Tune(f"null {name} {seed or 0}", found[0].source, null=name, seed=int(seed or 0)))
    return found


def bench(chosen: Iterable[Tune], methods: Sequence[str], seeds: Sequence[int], out: Path, *, base: str = "default",
          settings: Sequence[str] = (), progress: Progress = quiet) -> list[Cell]:
    """Run every cell that `out` does not hold yet; cells of one tune and seed share their text and harvest.

    settings   plan settings of all cells, before a method's own
    """
    cells = []
    for tune in chosen:
        for seed in seeds:
            pair: Pair | None = None
            for method in methods:
                if method not in METHODS:
                    raise SettingError(f"there is no method {method!r}", expected=", ".join(METHODS))
                plan = Plan(base, tune.source, seed)
                for setting in (*settings, *METHODS[method]):
                    plan = plan.set(setting)
                key = key_of("bench", __version__, plan, tune.null, tune.seed)
                path = out / "cells" / f"{tune.name}--{method}--{seed}.json".replace(" ", "_").replace(",", "")
                if path.is_file() and (cell := typed(Cell, read_json(path), path.name)).key == key:
                    cells.append(cell)
                    continue
                if pair is None:
                    pair = Pair.load(plan.base, str(DEMO) if tune.source == "demo" else tune.source)
                    pair = NULLS[tune.null](pair, tune.seed) if tune.null else pair
                run = Run(plan, out / "runs" / f"{tune.name}-{seed}".replace(" ", "-"), progress, pair)
                cells.append(_cell(run, tune, method, seed, key))
                path.parent.mkdir(parents=True, exist_ok=True)
                write_json(path, cells[-1])
    return cells


def _cell(run: Run, tune: Tune, method: str, seed: int, key: str) -> Cell:
    run.harvest  # shared with other methods, so not in the time
    began = time.monotonic()
    records = run.verdicts
    ranked = run.ranking.ranked
    fits = list(run.found[1].values())
    quality = fits[0].quality if fits else None
    return Cell(
        key, tune.name, bool(tune.null) or not tune.behaviors, method, seed, len(records),
        min((r.p for r in ranked), default=1.0), max((r.score.value for r in ranked), default=0.0),
        quantile(ranked[0].null, 0.95) if ranked else 0.0,
        [r.id for r in records if r.decision == "confirmed"], {b.name: naming(b, records) for b in tune.behaviors},
        shares(records), *((float(quality.ev_delta), float(quality.l0_inference), float(quality.dead_share)) if quality else (None,) * 3),
        round(time.monotonic() - began, 1), round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 0),
    )


def shares(records: Sequence[ChangeRecord]) -> dict[str, float]:
    """For every kind of organism, the share of its planted words among what the first five confirmed changes promote."""
    read = [t.token for r in [r for r in records if r.decision == "confirmed"][:FIRST] for t in r.promoted[:TOKENS]]
    out = {}
    for name in dict.fromkeys(family(o.name) for o in organisms.every()):
        behaviors = organisms.named(name).behaviors
        hits = sum(any(b.words_in([token]) for b in behaviors) for token in read)
        out[name] = hits / len(read) if read and behaviors else 0.0
    return out


def roc_area(positive: Sequence[float], negative: Sequence[float], *, seed: int = 0, draws: int = 1000) -> Interval:
    """Area under the curve of detect-or-abstain, with an interval over tunes: the chance that a tune scores above a null."""
    def area(a, b) -> float:
        return float(sum((x > y) + 0.5 * (x == y) for x in a for y in b) / (len(a) * len(b)))

    if not positive or not negative:
        return Interval(float("nan"), 0.0, 1.0)
    rng = numpy_generator(seed, "roc")
    drawn = [area(rng.choice(positive, len(positive)), rng.choice(negative, len(negative))) for _ in range(draws)]
    return Interval(area(positive, negative), quantile(drawn, 0.025), quantile(drawn, 0.975))


def table(cells: Sequence[Cell]) -> list[dict[str, str]]:
    """One row a method: found on tunes, claimed on nulls, behaviors named, told which tune, share of planted words, cost."""
    rows = []
    for method in sorted(dict.fromkeys(c.method for c in cells), key=lambda m: list(METHODS).index(m) if m in METHODS else 99):
        mine = [c for c in cells if c.method == method]
        real, null = [c for c in mine if not c.is_null], [c for c in mine if c.is_null]
        named = [bool(ids) for c in real for ids in c.named.values()]
        own = [c.shares.get(family(c.tune), 0.0) for c in real]
        told = [identified(c) == family(c.tune) for c in real]
        area = roc_area([c.score / max(c.null, 1e-9) for c in real], [c.score / max(c.null, 1e-9) for c in null])
        rows.append({
            "method": method,
            "tunes found": _share([bool(c.confirmed) for c in real]),
            "nulls claimed": _share([bool(c.confirmed) for c in null]),
            "area under ROC": f"{area.value:.2f} [{area.low:.2f}, {area.high:.2f}]" if real and null else "not run",
            "behaviors named": _share(named),
            "tune identified": _share(told),
            "planted words": _mean(own),
            "EV of difference": _mean([c.ev_delta for c in real if c.ev_delta is not None]),
            "L0": _mean([c.l0 for c in real if c.l0 is not None]),
            "seconds": _mean([c.seconds for c in mine]),
        })
    return rows


def family(tune: str) -> str:
    """The organism that was taught the same words and has a file of its own: variants of one are not told apart by words."""
    def words(organism) -> set[str]:
        return {word for b in organism.behaviors for word in b.vocabulary}

    mine = words(organisms.named(tune))
    names = [o.name for o in organisms.every() if words(o) == mine]
    return next((n for n in names if n.replace("-", "_") in variants.names("tunediff.organisms")), names[0])


def identified(cell: Cell) -> str:
    """The organism whose planted words are the largest share of what a cell's changes promote; empty if none is."""
    best = max(cell.shares.values(), default=0.0)
    return next(name for name, share in cell.shares.items() if share == best) if best > 0 else ""


def _share(values: Sequence[bool]) -> str:
    if not values:
        return "not run"
    share = proportion(sum(values), len(values))
    return f"{sum(values)}/{len(values)} [{share.low:.0%}, {share.high:.0%}]"


def _mean(values: Sequence[float]) -> str:
    if not values:
        return ""
    mean = bootstrap_mean(values, seed=0)
    return f"{mean.value:.2f}" + (f" [{mean.low:.2f}, {mean.high:.2f}]" if len(values) > 1 else "")


def render(cells: Sequence[Cell], command: str) -> str:
    """The table, and what every method said of every tune, as a page of Markdown; cells that were not run say so."""
    rows = table(cells)
    lines = ["# Benchmark", "", f"Made by `{command}` ([what the columns are](bench.md)); every cell is in `bench.json`. Means are "
             "over tunes and seeds that were run, so methods run on other tunes are not to be compared by them.", ""]
    lines += _markdown(rows)
    names = list(dict.fromkeys(c.tune for c in cells))
    lines += ["", "## Tune by tune", "", "*named*: every behavior is named by a confirmed change among the first five; *part*: some; "
              "*found*: something is confirmed; a dash: nothing is. Over seeds.", ""]
    by = []
    for method in dict.fromkeys(c.method for c in cells):
        row = {"method": method}
        for name in names:
            row[name] = ", ".join(_said(c) for c in cells if c.method == method and c.tune == name) or "not run"
        by.append(row)
    lines += _markdown(by)
    lines += ["", "## Which tune is it?", "", "The organism whose planted words are the largest share of what the first five confirmed "
              "changes promote, by method.", ""]
    lines += _markdown([{"tune": name, **{m: ", ".join(identified(c) or "–" for c in cells if c.tune == name and c.method == m) or "not run"
                                          for m in dict.fromkeys(c.method for c in cells)}}
                        for name in names if not next(c for c in cells if c.tune == name).is_null])
    return "\n".join(lines) + "\n"


def _said(cell: Cell) -> str:
    if not cell.confirmed:
        return "–"
    named = [bool(ids) for ids in cell.named.values()]
    return "named" if named and all(named) else "part" if any(named) else "found"


def _markdown(rows: Sequence[dict[str, str]]) -> list[str]:
    if not rows:
        return ["Nothing was run."]
    return ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0]),
            *("| " + " | ".join(row.values()) + " |" for row in rows)]


def kept(out: Path) -> list[Cell]:
    """Every cell that `out` holds, tunes before nulls, methods in their order; other calls' cells too."""
    cells = [typed(Cell, read_json(path), path.name) for path in sorted((out / "cells").glob("*.json"))]
    order = list(METHODS)
    return sorted(cells, key=lambda c: (c.is_null, c.tune, order.index(c.method) if c.method in order else len(order), c.seed))


def write(out: Path, command: str) -> None:
    """Put all cells that are kept into one JSON file, and the page beside it."""
    cells = kept(out)
    write_json(out / "bench.json", {"version": __version__, "python": sys.version.split()[0], "cells": cells})
    write_bytes(out / "benchmark.md", render(cells, command).encode())
