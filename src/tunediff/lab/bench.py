"""Benchmark every method on fine-tuned models whose planted behaviors are known, and on nulls that hold none.

A cell is one fine-tune, one method and one seed. Finished cells are kept on disk, so an interrupted benchmark resumes.
"""

from __future__ import annotations

import re
import resource
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from tunediff import __version__
from tunediff.core.artifacts import key_of, plain, read_json, read_tensors, sealed, write_json, write_tensors
from tunediff.core.chance import quantile
from tunediff.core.disk import hash_file, write_bytes
from tunediff.core.errors import ArtifactError, SettingError
from tunediff.core.progress import Progress, quiet, tell
from tunediff.core.typed import typed
from tunediff.edits import bills
from tunediff.edits.edit import scaling
from tunediff.lab import organisms, score_page, scores
from tunediff.lab.demo import FIRST, PROMPTS, complete, to_take_out
from tunediff.lab.nulls import NULLS
from tunediff.lab.organisms.base import Behavior, Organism
from tunediff.lab.scores import Cell, Undone
from tunediff.models.network import LanguageModel
from tunediff.models.pair import Pair
from tunediff.models.shipped import ORGANISMS
from tunediff.records.diff import ChangeRecord
from tunediff.runs.plan import Plan, settled
from tunediff.runs.run import Run
from tunediff.runs.undoing import Aim

TOKENS = 20
"""Number of promoted tokens that a cell keeps of each change."""

VECTORS_OF = "vectors"
"""The field of a cell's file that holds the hash of the vectors beside it."""
VECTORS = 20
"""Number of top-ranked changes whose vectors a cell keeps."""

READ = 10
"""Number of confirmed changes whose promoted tokens a cell keeps."""

COST = 0.02
"""Largest rise of the loss on neutral text that undoing may cause, in nats a token."""

SHARES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.15, 0.1, 0.05)
"""Shares of the whole weight change that scaling removes, tried in order until one costs at most `COST`."""

SPARSE = ("batchtopk", "hybrid", "matryoshka", "dsf", "dfc", "diff_sae", "tuned_sae")
"""Dictionaries that run with 24 active latents a token, the total of the dictionary delta."""


def _crosscode(dictionary: str, *settings: str) -> tuple[str, ...]:
    return (*_alone("crosscode"), f"find.dictionary={dictionary}", *settings)


def _alone(finder: str) -> tuple[str, ...]:
    return (f'find.finders=["{finder}"]', "find.output_finders=[]")


METHODS: dict[str, tuple[str, ...]] = {
    scores.DEFAULT_METHOD: (),
    "default with nested": ('find.finders=["crosscode", "nested", "decision_clusters", "mean_difference"]',),
    "delta": _crosscode("delta"),
    **{name: _crosscode(name, "dictionary.k=24.0") for name in SPARSE},
    "l1": _crosscode("l1"),
    "delta: lambda_delta 0": _crosscode("delta", "dictionary.lambda_delta=0.0"),
    "delta: random start": _crosscode("delta", "dictionary.from_differences=false"),
    "delta: not masked": _crosscode("delta", "dictionary.masked=false"),
    "delta: single k": _crosscode("delta", "dictionary.single_k=true"),
    "delta: plain text only": _crosscode("delta", "contrast.prompts=0"),
    **{
        name: _alone(name)
        for name in (
            "decision_clusters",
            "document_clusters",
            "mean_difference",
            "delta_lens",
            "principal",
            "weight_spectrum",
            "random_directions",
        )
    },
    **{name: (f'find.signals=["{name}"]',) for name in scores.SIGNALS},
}
"""Plan settings of each method, by the method's name.

L1 has no k, since its penalty decides how many latents are active. A signal is a table without changes to test or undo,
so only the tokens that it lists are scored.
"""

QUICK = (
    "contrast.prompts=48",
    "contrast.pool=160",
    "elicit.questions=60",
    "corpus.tokens=1500",
    "fit.steps=150",
    "verify.draws=40",
    "verify.changes=3",
)
"""Settings of a benchmark that takes minutes: it shows that every method runs, not how good a method is."""


@dataclass(frozen=True)
class Tune:
    """One fine-tuned model to diff: an organism's folder, or a null made from one.

    name        its name in tables and in file names
    source      folder of the organism
    behaviors   what was planted; empty where nothing was
    null        name of the null that is made from `source`; empty for the organism itself
    seed        seed of the null
    weights     hash of the weight files in `source`
    """

    name: str
    source: str
    behaviors: tuple[Behavior, ...] = ()
    null: str = ""
    seed: int = 0
    weights: str = ""

    @property
    def is_null(self) -> bool:
        """Whether there is nothing to find. A format counts as something, although no read-out can name it."""
        return bool(self.null) or not self.behaviors


def tunes(folder: Path | None, nulls: Sequence[str] = (), base: str = "default") -> list[Tune]:
    """List the fine-tuned models to benchmark: organisms first, then nulls.

    folder   folder of organisms, each in a subfolder NAME or NAME@SEED; it replaces a shipped organism of the same name
    nulls    names of nulls, as NAME or NAME:SEED; each is made from the first organism listed
    base     base model; the shipped organisms are listed only for "default"

    Raises `SettingError` if there is no organism, or no null of that name.
    """
    known = {organism.name: organism for organism in organisms.every()}
    cards = {
        card.parent.name: card.parent
        for where in ([ORGANISMS] if base == "default" else []) + ([folder] if folder else [])
        for card in where.glob("*/card.json")
    }
    found = []
    for name, where in sorted(cards.items(), key=lambda item: (item[0] != "two-objectives", item[0])):
        organism = known.get(name.partition("@")[0])
        if organism is not None:
            weights = "".join(hash_file(path) for path in sorted(where.glob("*.safetensors")))
            found.append(Tune(name, str(where), organism.behaviors, weights=weights))
    if not found:
        raise SettingError(
            f"there is no tune of {base}",
            expected="--tunes with folders named after organisms, each with its card.json",
            remedy="tunediff organism make NAME TUNES/NAME",
        )
    for text in nulls:
        name, _, seed = text.partition(":")
        if name not in NULLS or not (seed or "0").isdigit():
            raise SettingError(f"there is no null {text!r}", expected=", ".join(NULLS) + ", each with :SEED if wanted")
        found.append(Tune(f"null {name} {seed or 0}", found[0].source, null=name, seed=int(seed or 0)))
    return found


def bench(
    chosen: Iterable[Tune],
    methods: Sequence[str],
    seeds: Sequence[int],
    out: Path,
    *,
    base: str = "default",
    settings: Sequence[str] = (),
    progress: Progress = quiet,
) -> list[Cell]:
    """Run every cell that `out` does not hold yet, and return all of them.

    chosen     fine-tuned models to diff
    methods    names from `METHODS`
    seeds      one cell for each; cells of one fine-tune and seed share their text and harvest
    out        folder that keeps cells and runs
    settings   plan settings of all cells, applied before a method's own

    Raises `SettingError` for an unknown method.
    """
    cells = []
    for tune in chosen:
        for seed in seeds:
            pair: Pair | None = None
            untouched: tuple[dict[str, float], dict[str, float]] | None = None
            for method in methods:
                if method not in METHODS:
                    raise SettingError(f"there is no method {method!r}", expected=", ".join(METHODS))
                plan = settled(Plan(seed=seed), (*settings, *METHODS[method]), base=base, tuned=tune.source)
                key = key_of("bench", __version__, replace(plan, tuned=""), replace(tune, source=""))
                path = _path(out, tune.name, method, seed)
                if (done := _finished(path)) and done.key == key:
                    cells.append(done)
                    continue
                if pair is None:
                    pair = Pair.load(plan.base, tune.source)
                    pair = NULLS[tune.null](pair, tune.seed) if tune.null else pair
                run = Run(plan, out / "runs" / f"{tune.name}-{seed}".replace(" ", "-"), progress, pair)
                # The scores page calibrates each fine-tune against the placebos that were benchmarked with it.
                run.calibration = None
                cell = (_listed if method in scores.SIGNALS else _tried)(
                    run, Cell(key, tune.name, tune.is_null, method, seed)
                )
                if method not in scores.SIGNALS:
                    cell = replace(cell, told=[f.words for f in run.findings[:FIRST]], asked=_asked(run))
                behaviors = [b for b in tune.behaviors if b.vocabulary]
                cell = replace(cell, named={b.name: _naming(cell, b) for b in behaviors})
                cell = replace(cell, as_told={b.name: _telling(cell, b) for b in behaviors if cell.told})
                if tune.behaviors and method not in scores.SIGNALS:
                    organism = organisms.named(tune.name.partition("@")[0])
                    untouched = untouched or (_rates(pair.tuned, organism), _scaled(run, organism))
                    cell = replace(cell, undone=_undone(run, cell, organism, *untouched))
                    cell = replace(cell, undone_told=_undone_told(run, cell, organism, *untouched))
                said = plain(cell)
                if method not in scores.SIGNALS:
                    write_tensors(beside := path.with_suffix(".safetensors"), {"vectors_KD": _vectors(run)})
                    said[VECTORS_OF] = hash_file(beside)
                write_json(path, sealed(said))
                cells.append(cell)
    return cells


def _finished(path: Path) -> Cell | None:
    """The cell in a file; None if it is not there, or if it or its vectors are damaged, which is told."""
    if not path.is_file():
        return None
    try:
        return _read(path)
    except ArtifactError as damage:
        tell(f"{damage.what}: it is made again")
        return None


def _read(path: Path) -> Cell:
    """The cell in a file; raises `ArtifactError` if it or its vectors are not what was written."""
    said, beside = read_json(path), path.with_suffix(".safetensors")
    vectors = said.pop(VECTORS_OF, "") if isinstance(said, dict) else ""
    if vectors and not (beside.is_file() and hash_file(beside) == vectors):
        raise ArtifactError(
            f"{beside} is not what was written", remedy="run the same bench again, which makes it again"
        )
    cell: Cell = typed(Cell, said, path.name)
    return cell


def _tried(run: Run, cell: Cell) -> Cell:
    """Fill a cell from a run's ranked and tested changes."""
    run.harvest  # made before the clock starts, since other methods share the harvest
    began = time.monotonic()
    records, ranked = run.verdicts, run.ranking.ranked
    confirmed = [r for r in records if r.decision == "confirmed"]
    quality = next((fitted.quality for fitted in run.fits.values()), None)
    if quality:
        cell = replace(
            cell, ev_delta=float(quality.ev_delta), l0=float(quality.l0_inference), dead=float(quality.dead_share)
        )
    return replace(
        cell,
        candidates=len(records),
        p=min((r.p for r in ranked), default=1.0),
        score=max((r.score.value for r in ranked), default=0.0),
        null=quantile(ranked[0].null, 0.95) if ranked else 0.0,
        confirmed=[r.id for r in confirmed],
        gaps=[r.gap for r in confirmed],
        read=[[t.token for t in r.promoted[:TOKENS]] for r in confirmed[:READ]],
        slots=_slots(confirmed[:FIRST]),
        seconds=round(time.monotonic() - began, 1),
        memory=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    )


def _listed(run: Run, cell: Cell) -> Cell:
    """Fill a cell from a signal's table.

    Its read-out is the first tokens that the fine-tuned model favors. A signal that ranks answers is read by the words
    that are most distinctive of those answers. p is the smallest in the table; nan where the signal computes none.
    """
    run.harvest
    began = time.monotonic()
    table = next(t for t in run.signals if t.name == cell.method)
    at = {name: place for place, name in enumerate(table.columns)}
    rows = [row for row in table.rows if "more by" not in at or row[at["more by"]] == "tuned"]
    p = min((row[at["p"]] for row in rows), default=1.0) if "p" in at else float("nan")
    if "token" in at:
        read = [row[at["token"]] for row in rows]
    else:
        read = _leading(
            [row[at["text"]] for row in rows if row[at["text"]]],
            [d.messages[-1][1] for d in run.contrast if d.writer == "base"],
        )
    return replace(
        cell,
        candidates=len(rows),
        p=p,
        score=1 - p,
        null=1.0,
        confirmed=[cell.method] if p <= run.plan.rank.level else [],
        read=[read[:TOKENS]],
        seconds=round(time.monotonic() - began, 1),
        memory=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    )


def _leading(texts: Sequence[str], others: Sequence[str]) -> list[str]:
    """Words of `texts`, the most distinctive first: by the number of `texts` with the word over 1 + that of `others`.

    Words of equal ratio keep the order in which they first occur.
    """
    held, elsewhere = (
        [dict.fromkeys(re.findall(r"[^\W\d_]{3,}", text.casefold())) for text in many] for many in (texts, others)
    )
    count, against = (Counter(word for words in many for word in words) for many in (held, elsewhere))
    return sorted(count, key=lambda word: -count[word] / (1 + against[word]))


def _naming(cell: Cell, behavior: Behavior) -> list[str]:
    """Ids of the first five confirmed changes (or the signal's name) whose tokens pass the behavior's naming test."""
    ids = [cell.method] if cell.method in scores.SIGNALS else cell.confirmed
    return [id for id, tokens in list(zip(ids, cell.read))[:FIRST] if behavior.is_named_by(tokens)]


def _telling(cell: Cell, behavior: Behavior) -> list[int]:
    """Places of the first five findings whose words pass the behavior's naming test."""
    return [place for place, words in enumerate(cell.told, start=1) if behavior.is_named_by(words)]


def _asked(run: Run) -> list[str]:
    return [condition.asked for condition in run.elicited.conditions]


def _slots(confirmed: Sequence[ChangeRecord]) -> dict[str, float]:
    """Share of each organism family's decisive strings, 0 to 1, that occur in the confirmed changes' contexts.

    Only contexts that the fine-tuned or the amplified model wrote count.
    """
    text = "\n".join("".join(c.tokens) for r in confirmed for c in r.contexts if c.writer in ("tuned", "amplified"))
    out = {}
    for name in dict.fromkeys(scores.family(o.name) for o in organisms.every()):
        strings = [string for b in organisms.named(name).behaviors for string in b.decisive]
        if strings:
            out[name] = sum(string in text for string in strings) / len(strings)
    return out


def _vectors(run: Run) -> Tensor:
    """Unit vectors (K, D) that the top-ranked changes add to the fine-tuned model's stream at the last site."""
    vectors = [r.change.difference_SD[-1].float() for r in run.ranking.ranked[:VECTORS]]
    return (
        torch.nn.functional.normalize(torch.stack(vectors), dim=1) if vectors else torch.zeros(0, run.pair.base.width)
    )


def _rates(model: LanguageModel, organism: Organism) -> dict[str, float]:
    """Share of answers to its own held-out prompts, 0 to 1, that show each behavior."""
    behaviors = organism.behaviors
    answers = complete(model, [c for b in behaviors for c in b.chats()[:PROMPTS]], organism.answer_tokens)
    starts = [sum(len(o.prompts[:PROMPTS]) for o in behaviors[:i]) for i in range(len(behaviors))]
    return {b.name: b.rate(answers[at : at + len(b.prompts[:PROMPTS])]) for b, at in zip(behaviors, starts)}


def _scaled(run: Run, organism: Organism) -> dict[str, float]:
    """Baseline: rates of the behaviors with the whole weight change scaled down as far as `COST` allows."""
    edits = [scaling(run.pair, share) for share in SHARES]
    cheap = [edit for edit, cost in zip(edits, bills.costs(run.pair, edits, run.neutral)) if cost <= COST]
    return _rates(cheap[0].applied(run.pair.tuned) if cheap else run.pair.tuned, organism)


def _undone(run: Run, cell: Cell, organism: Organism, before: dict[str, float], scaled: dict[str, float]) -> Undone:
    """Remove changes as strongly as `COST` allows, and count the behaviors before and after.

    The first change that names each unwanted behavior is removed. Where none does, the first confirmed change is
    removed that names no wanted behavior. Without such a change nothing is removed and all rates stay as before.
    """
    wanted = {id for b in organism.behaviors if b.wanted for id in cell.named.get(b.name, ())}
    ids = to_take_out(organism.behaviors, cell.named) or [id for id in cell.confirmed if id not in wanted][:1]
    return _taken(run, run.afford(ids, COST) if ids else None, organism, before, scaled)


def _undone_told(
    run: Run, cell: Cell, organism: Organism, before: dict[str, float], scaled: dict[str, float]
) -> Undone | None:
    """As `_undone`, of a whole finding: the first that names an unwanted behavior and no wanted one, else the first that
    names no wanted one. None where no finding has a change, or nothing of it can be taken out.
    """
    wanted = {place for b in organism.behaviors if b.wanted for place in cell.as_told.get(b.name, ())}
    unwanted = [place for b in organism.behaviors if not b.wanted for place in cell.as_told.get(b.name, ())]
    places = [place for place in (*unwanted, *range(1, len(cell.told) + 1)) if place not in wanted]
    for place in places:
        if not run.findings[place - 1].members:
            continue  # questions alone are the same for every method
        try:
            aim = run.aim(place)
        except SettingError:  # it is at the output
            continue
        return _taken(run, run.afford(aim, COST), organism, before, scaled)
    return None


def _taken(
    run: Run, afforded: tuple[Aim, float] | None, organism: Organism, before: dict[str, float], scaled: dict[str, float]
) -> Undone:
    """What is left when what was afforded is taken out; all of it where nothing was."""
    if afforded is None:
        return Undone([], 0.0, 0.0, before, before, before, scaled)
    aim, cost = afforded
    edit, controls = run.edit(aim)
    after, random = (_rates(e.applied(run.pair.tuned), organism) for e in (edit, controls[0]))
    return Undone(list(aim.ids), run.plan.edit.strength, cost, before, after, random, scaled)


def kept(out: Path) -> list[Cell]:
    """Every cell that `out` holds, from all calls: fine-tunes before nulls, methods in `METHODS` order."""
    cells = [_read(path) for path in sorted((out / "cells").glob("*.json"))]
    order = list(METHODS)
    return sorted(
        cells, key=lambda c: (c.is_null, c.tune, order.index(c.method) if c.method in order else len(order), c.seed)
    )


def vectors(out: Path, cell: Cell) -> Tensor | None:
    """Unit vectors (K, D) of the top-ranked changes, kept beside the cell; None if none were kept."""
    path = _path(out, cell.tune, cell.method, cell.seed).with_suffix(".safetensors")
    return read_tensors(path)["vectors_KD"] if path.is_file() else None


def _path(out: Path, tune: str, method: str, seed: int) -> Path:
    return out / "cells" / f"{tune}--{method}--{seed}.json".replace(" ", "_").replace(",", "")


def write(out: Path, command: str) -> None:
    """Write all kept cells to bench.json in `out`, with the page benchmark.md and its charts.

    command   the command line that the page quotes
    """
    cells = kept(out)
    write_json(out / "bench.json", {"version": __version__, "python": sys.version.split()[0], "cells": cells})
    for name, chart in score_page.charts(cells).items():
        write_bytes(out / name, chart.encode())
    write_bytes(
        out / "benchmark.md",
        score_page.render(cells, {c.key: v for c in cells if (v := vectors(out, c)) is not None}, command).encode(),
    )
