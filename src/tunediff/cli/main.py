"""The command line: one verb a stage; results on stdout, progress on stderr, errors in four lines."""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tunediff.core import pages
from tunediff.core.artifacts import is_finished, read_json, to_json, write_json
from tunediff.core.errors import ArtifactError, SettingError, TunediffError

if TYPE_CHECKING:
    from tunediff.records.diff import Bill, Diff
    from tunediff.runs.run import Run

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Finds what fine-tuning changed inside a model, proves it by intervening, and undoes it.",
)
organism_app = typer.Typer(no_args_is_help=True, help="Fine-tunes whose truth is known.")
app.add_typer(organism_app, name="organism")

Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="PART.FIELD=VALUE", help="Change one setting; repeatable.")
]
PlanFile = Annotated[Path | None, typer.Option("--plan", help="A TOML plan to start from.")]
Name = Annotated[str | None, typer.Option("--run", help="Name of the run; by default made from the models' names.")]
Runs = Annotated[Path, typer.Option("--runs", help="Folder that holds runs.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
Base = Annotated[str, typer.Argument(help="A folder, hub id, GGUF file, or `default` (SmolLM2-135M-Instruct).")]
Tuned = Annotated[str, typer.Argument(help="Any of these, a PEFT adapter folder, or `demo` (ships with tunediff).")]
ExitCode = Annotated[bool, typer.Option("--exit-code", help="Exit with 1 if a change was confirmed, 0 if none was.")]


def _run(
    base: str, tuned: str, name: str | None, runs: Path, plan_file: Path | None, settings: list[str] | None, quiet: bool
) -> Run:
    """The run these options name; refuses to reuse a name for another pair."""
    _hush(quiet)
    import dataclasses

    from tunediff.core.progress import ProgressBar
    from tunediff.runs.plan import Plan
    from tunediff.runs.run import Run

    plan = Plan.read(plan_file) if plan_file else Plan()
    plan = dataclasses.replace(plan, base=base, tuned=tuned)
    for text in settings or []:
        plan = plan.set(text)
    plan.check()
    name = name or slug(f"{Path(base).name}-{Path(tuned).name}")
    if slug(name) != name:
        raise SettingError(
            f"{name!r} is not a run name", expected="letters, digits, dot, dash, underscore", remedy=slug(name)
        )
    folder = runs / name
    if (folder / "plan.toml").is_file():
        before = Plan.read(folder / "plan.toml")
        if (before.base, before.tuned) != (base, tuned):
            raise ArtifactError(
                f"{folder} belongs to another pair",
                expected=f"{before.base} and {before.tuned}",
                got=f"{base} and {tuned}",
                remedy="--run NAME",
            )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArtifactError(
            f"{folder} cannot be made", got=error.strerror or str(error), remedy="--runs FOLDER"
        ) from None
    return Run(plan, folder, ProgressBar(enabled=not quiet))


def _reopen(run: str, runs: Path, quiet: bool, settings: list[str] | None = None) -> Run:
    """An existing run, by name or folder, under its own plan."""
    _hush(quiet)
    from tunediff.core.progress import ProgressBar
    from tunediff.runs.plan import Plan
    from tunediff.runs.run import Run

    folder = _folder(run, runs, "plan.toml")
    plan = Plan.read(folder / "plan.toml")
    for text in settings or []:
        plan = plan.set(text)
    plan.check()
    return Run(plan, folder, ProgressBar(enabled=not quiet))


def _folder(run: str, runs: Path, file: str) -> Path:
    """The folder of a run given by name or folder; it must hold `file`."""
    folder = Path(run) if (Path(run) / file).is_file() else runs / run
    if not (folder / file).is_file():
        known = sorted(p.parent.name for p in runs.glob(f"*/{file}"))
        what = f"run {run!r} is not finished" if (folder / "plan.toml").is_file() else f"there is no run {run!r}"
        raise ArtifactError(what, expected=", ".join(known) or f"a run in {runs}", remedy="tunediff diff BASE TUNED")
    return folder


def _hush(quiet: bool) -> None:
    """Keep other libraries' progress bars off stderr unless somebody watches; before they are first imported."""
    if quiet or not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def slug(text: str) -> str:
    """A file-safe name of at most 80 characters."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.")[:80].rstrip("-.") or "run"


def _tell(run: Run, billed: list[Bill], json: bool) -> Diff:
    """Write diff.json and report.html, print the summary; returns the record."""
    from tunediff.reports.page import write_report
    from tunediff.reports.terminal import summary_table

    diff = run.diff(billed)
    diff.save(run.folder / "diff.json")
    write_report(diff, run.folder / "report.html")
    run.progress.close()
    if json:
        typer.echo(to_json(diff, indent=1))
    else:
        from rich.console import Console

        console = Console(width=None if sys.stdout.isatty() else 110)
        console.print(summary_table(diff))
        console.print(
            f"report  {run.folder / 'report.html'}\nrecord  {run.folder / 'diff.json'}", highlight=False, soft_wrap=True
        )
    return diff


@app.command()
def diff(
    base: Base,
    tuned: Tuned,
    name: Name = None,
    runs: Runs = Path("runs"),
    plan: PlanFile = None,
    set_: Set = None,
    undo: Annotated[bool, typer.Option(help="Bill the undoing of the first confirmed changes.")] = True,
    json: Json = False,
    exit_code: ExitCode = False,
    quiet: Quiet = False,
) -> None:
    """Find what changed between two models, prove it, say what undoing it costs, and write a report."""
    run = _run(base, tuned, name, runs, plan, set_, quiet)
    confirmed = [r.id for r in run.verdicts if r.decision == "confirmed"]
    found = _tell(run, [run.bill([id]) for id in confirmed[: run.plan.edit.bills]] if undo else [], json).found
    if exit_code and found:
        raise typer.Exit(1)


def _stage(stage: str):
    """A command that runs the stages up to `stage` and prints what came out."""

    def command(
        base: Base,
        tuned: Tuned,
        name: Name = None,
        runs: Runs = Path("runs"),
        plan: PlanFile = None,
        set_: Set = None,
        json: Json = False,
        quiet: Quiet = False,
    ) -> None:
        run = _run(base, tuned, name, runs, plan, set_, quiet)
        rows = _STAGES[stage][1](run)
        run.progress.close()
        typer.echo(to_json(rows, indent=1) if json else _table(rows))

    command.__doc__ = _STAGES[stage][0]
    return command


def _table(rows: list[dict]) -> str:
    from tunediff.core.text import visible

    if not rows:
        return "nothing"
    columns = list(rows[0])
    cells = [columns] + [
        [visible(f"{v:.4g}" if isinstance(v, float) else str(v)) for v in row.values()] for row in rows
    ]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths)).rstrip() for line in cells)


def _harvest_rows(run: Run) -> list[dict]:
    m = run.harvest.manifest
    return [
        {
            "site": s,
            "tokens": m["tokens"],
            "set_apart": m["set_apart"],
            "base_energy": m["base_energy"][i],
            "delta_energy": m["delta_energy"][i],
            "noise": m["noise"][i],
        }
        for i, s in enumerate(m["sites"])
    ]


def _find_rows(run: Run) -> list[dict]:
    return [
        {"id": c.id, "sites": ", ".join(map(str, c.sites)), "share": c.share, "size": float(c.difference_SD.norm())}
        for c in run.changes
    ]


def _rank_rows(run: Run) -> list[dict]:
    return [
        {
            "rank": i + 1,
            "id": r.change.id,
            "score": r.score.value,
            "null_best": max(r.null),
            "p": r.p,
            "effect": str(r.effect),
            "tokens_on": r.share_of_tokens,
        }
        for i, r in enumerate(run.ranking.ranked)
    ]


def _verify_rows(run: Run) -> list[dict]:
    return [{"rank": r.rank, "id": r.id, "decision": r.decision, "reason": r.reason} for r in run.verdicts]


_STAGES = {
    "harvest": ("Run both models on the same text and keep their streams at the chosen sites.", _harvest_rows),
    "find": ("Propose candidate changes from the harvest.", _find_rows),
    "rank": ("Hold candidates against random tunes of the same size, and order them.", _rank_rows),
    "verify": ("Intervene on the first candidates, against random directions of equal energy.", _verify_rows),
}
for _stage_name in _STAGES:
    app.command(_stage_name)(_stage(_stage_name))


@app.command()
def revert(
    run: Annotated[str, typer.Argument(help="A run's name or folder.")],
    changes: Annotated[
        str | None, typer.Option(help="Ids of changes to take out, comma-separated; default: all confirmed.")
    ] = None,
    cost: Annotated[
        float | None,
        typer.Option(
            help="Take them out as strongly as this many nats a token on neutral text allow; default: edit.strength.",
            min=0,
        ),
    ] = None,
    bake: Annotated[Path | None, typer.Option(help="Write the edited model as a Hugging Face folder.")] = None,
    runs: Runs = Path("runs"),
    set_: Set = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Take changes out of the tuned model, print what that does and costs, and bake it into weights if asked."""
    opened = _reopen(run, runs, quiet, set_)
    from tunediff.edits.baking import bake_edit, check_empty

    if bake is not None:
        check_empty(bake)  # now, as the bill takes a while
    ids = _listed(changes) or [r.id for r in opened.verdicts if r.decision == "confirmed"]
    if not ids:
        raise SettingError("this run confirmed no change, so there is nothing to take out", remedy="--changes ID")
    if cost is not None and opened.afford(ids, cost) is None:
        raise SettingError(
            f"no edit takes {', '.join(ids)} out at {cost:g} nat a token on neutral text",
            expected="a higher --cost",
            remedy="fewer --changes",
        )
    bill = opened.bill(ids)
    if bake is not None:
        edit, _ = opened.edit(ids)
        bake_edit(opened.pair, edit, bill, bake)
    opened.progress.close()
    rows = [
        {
            "measure": m.name,
            "value": _with_interval(m),
            "control": "" if m.control is None else f"{m.control:.3g}",
            "unit": m.unit,
            "against": m.against,
        }
        for m in bill.measures
    ]
    typer.echo(to_json(bill, indent=1) if json else _table(rows))
    if bake is not None:
        typer.echo(f"baked   {bake}", err=json)


def _listed(text: str | None, kind: Callable[[str], object] = str) -> list:
    """What stands between commas, each as `kind`; raises `SettingError` for what is none."""
    try:
        return [kind(part.strip()) for part in (text or "").split(",") if part.strip()]
    except ValueError as fault:
        raise SettingError(f"{text!r} is no list of numbers", expected="numbers by commas", got=str(fault)) from None


def _with_interval(measure) -> str:
    if measure.value is None:
        return "not measured"
    return f"{measure.value:.3g}" + ("" if measure.low is None else f" [{measure.low:.3g}, {measure.high:.3g}]")


@app.command()
def report(run: Annotated[str, typer.Argument(help="A run's name or folder.")], runs: Runs = Path("runs")) -> None:
    """Write the report again from a run's diff.json, without loading a model."""
    from tunediff.records.diff import Diff
    from tunediff.reports.page import write_report

    folder = _folder(run, runs, "diff.json")
    write_report(Diff.load(folder / "diff.json"), folder / "report.html")
    typer.echo(str(folder / "report.html"))


@app.command("list")
def list_(runs: Runs = Path("runs"), json: Json = False) -> None:
    """List runs, their pairs, and how far they have come."""
    from tunediff.runs.plan import Plan

    rows = []
    for path in sorted(runs.glob("*/plan.toml")):
        try:
            plan = Plan.read(path)
        except TunediffError as error:
            rows.append({"run": path.parent.name, "base": "", "tuned": "", "stages": "", "found": error.what})
            continue
        stages = [
            s for s in ("harvest", "find", "rank", "verify") if any(is_finished(p) for p in path.parent.glob(f"{s}/*"))
        ]
        record = path.parent / "diff.json"
        found = ""
        if record.is_file():
            confirmed = sum(c.get("decision") == "confirmed" for c in read_json(record).get("changes", []))
            found = f"{confirmed} confirmed"
        rows.append(
            {
                "run": path.parent.name,
                "base": plan.base,
                "tuned": plan.tuned,
                "stages": " ".join(stages),
                "found": found,
            }
        )
    typer.echo(to_json(rows, indent=1) if json else _table(rows))


@app.command()
def demo(runs: Runs = Path("runs"), set_: Set = None, json: Json = False, quiet: Quiet = False) -> None:
    """The main job on the embedded default: a real model and a tune of it with a wanted and a hidden objective.

    Runs `diff default demo`, then asks, by tests fixed beforehand, whether each objective is named by a confirmed change,
    takes the hidden one out alone, and counts both behaviors before and after.
    """
    from tunediff.lab.demo import check

    run = _run("default", "demo", "demo", runs, None, set_, quiet)
    checked = check(run)
    _tell(run, checked.bills, json)
    if not json:
        typer.echo(checked.text)


@app.command()
def calibrate(
    base: Base,
    count: Annotated[int, typer.Option(help="Untrained tunes, each about as long as a diff.", min=0)] = 9,
    placebo: Annotated[
        list[Path] | None, typer.Option(help="A placebo tune of this base: a harder null; repeatable.")
    ] = None,
    runs: Runs = Path("runs"),
    set_: Set = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure what pairs of BASE with nothing to find give; `diff` then asks for more than that."""
    _hush(quiet)
    from tunediff.core.progress import ProgressBar
    from tunediff.lab.nulls import calibrate as measure

    if not count and not placebo:
        raise SettingError("there is nothing to calibrate on", expected="--count above 0, or --placebo")
    done = measure(
        base,
        count,
        runs / f"calibrate-{slug(Path(base).name)}",
        tunes=list(map(str, placebo or ())),
        settings=set_ or (),
        progress=ProgressBar(enabled=not quiet),
    )
    path = done.save()
    if json:
        typer.echo(to_json(done, indent=1))
        return
    claimed = sum(null.gap > 0 for null in done.nulls)
    typer.echo(_table([{"null": null.name, "best score": null.score, "gap, nat": null.gap} for null in done.nulls]))
    typer.echo(
        f"{claimed} of {len(done.nulls)} claimed; a change of this base now has to score above {done.score:.3g}, where the models "
        f"are more than {done.gap:.2g} nat apart\nkept    {path}"
    )


@app.command()
def bench(
    out: Annotated[Path, typer.Option(help="Folder of results; cells that are there are not run again.")] = Path(
        "runs/bench"
    ),
    base: Annotated[str, typer.Option(help="The base of all tunes: a folder, hub id, or `default`.")] = "default",
    tunes: Annotated[
        Path | None, typer.Option(help="Folder of tunes made by `organism make`, each by its name.")
    ] = None,
    nulls: Annotated[str, typer.Option(help="Nulls, NAME or NAME:SEED, by commas.")] = "random:0,permuted:0,identical",
    methods: Annotated[str, typer.Option(help="Methods by commas; all of them if empty.")] = "",
    seeds: Annotated[str, typer.Option(help="Seeds by commas.")] = "0",
    only: Annotated[
        str,
        typer.Option(
            help="Of tunes and nulls those of these names, by commas, so that several processes may share the work."
        ),
    ] = "",
    quick: Annotated[
        bool, typer.Option("--quick", help="Minutes: the tune that ships, one null, two methods, a small budget.")
    ] = False,
    set_: Set = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Put methods through the same evidence on tunes whose truth is known and on nulls, and print the table."""
    _hush(quiet)
    from tunediff.core.progress import ProgressBar
    from tunediff.lab import bench as b
    from tunediff.lab.scores import table

    if quick:
        tunes, nulls, methods = None, "random:0", methods or "decision_clusters,random_directions"
    things = b.tunes(tunes, _listed(nulls), base)
    wanted = set(_listed(only))
    if unknown := wanted - {t.name for t in things}:
        raise SettingError(f"there is no tune {min(unknown)!r}", expected=", ".join(t.name for t in things))
    if wanted:
        things = [t for t in things if t.name in wanted]
    elif quick:
        things = [t for t in things if t.null or t.name == "two-objectives"]
    settings = [*(b.QUICK if quick else ()), *(set_ or ())]
    cells = b.bench(
        things,
        _listed(methods) or list(b.METHODS),
        _listed(seeds, int),
        out,
        base=base,
        settings=settings,
        progress=ProgressBar(enabled=not quiet),
    )
    b.write(out, "tunediff bench" + (" --quick" if quick else ""))
    typer.echo(to_json(table(cells), indent=1) if json else _table(table(cells)) + f"\npage    {out / 'benchmark.md'}")


@app.command()
def floor(
    base: Base,
    out: Annotated[Path, typer.Option(help="Folder of results.")] = Path("runs/floor"),
    background: Annotated[
        float,
        typer.Option(
            help="Size of a random change of every map that the planted one must stand out from, as a "
            "share of the map's norm; 0: none.",
            min=0,
        ),
    ] = 0.003,
    methods: Annotated[
        str, typer.Option(help="Methods by commas, of those that read streams alone.")
    ] = "delta,batchtopk,diff_sae,principal,mean_difference",
    amplitudes: Annotated[
        str, typer.Option(help="Lengths of the planted vector by commas, in units of the stream's norm.")
    ] = "0.02,0.05,0.1,0.2,0.5",
    frequencies: Annotated[str, typer.Option(help="Shares of tokens by commas.")] = "0.002,0.01,0.05",
    tokens: Annotated[int, typer.Option(help="Tokens of the default corpus.", min=500)] = 12_000,
    seeds: Annotated[str, typer.Option(help="Seeds by commas.")] = "0",
    set_: Set = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Plant known changes in BASE, from weak and rare to strong and frequent, and tell from which on they are found."""
    _hush(quiet)
    from tunediff.core.progress import ProgressBar
    from tunediff.lab import detection
    from tunediff.lab.bench import METHODS
    from tunediff.lab.nulls import untrained
    from tunediff.records.site import Site
    from tunediff.texts.corpus import Corpus

    chosen = {m: (*(set_ or ()), *METHODS[m]) if m in METHODS else None for m in _listed(methods)}
    if None in chosen.values():
        raise SettingError(
            f"there is no method {next(m for m, s in chosen.items() if s is None)!r}", expected=", ".join(METHODS)
        )
    strengths, shares, numbers = _listed(amplitudes, float), _listed(frequencies, float), _listed(seeds, int)
    pair = untrained(base, background, 0)
    text = detection.Text(
        pair.base,
        pair.tuned if background else pair.base,
        Corpus.default().tokens(pair.tokenizer, limit_tokens=tokens),
        Site(round(0.4 * pair.base.depth)),
        Site(round(0.67 * pair.base.depth)),
    )
    progress, done = ProgressBar(enabled=not quiet), []

    def told(one: detection.Detection) -> None:
        done.append(one)
        progress("floor", len(done), len(chosen) * len(strengths) * len(shares) * len(numbers))

    found = detection.grid(text, chosen, strengths, shares, numbers, out / "dictionaries", told)
    progress.close()
    out.mkdir(parents=True, exist_ok=True)
    write_json(
        out / "floor.json",
        {
            "base": base,
            "background": background,
            "write": str(text.write),
            "read": str(text.read),
            "tokens": len(text.ids_N),
            "detections": found,
        },
    )
    typer.echo(
        to_json(found, indent=1)
        if json
        else _table(detection.floor(found)) + "\nsmallest amplitude, in units of the stream's "
        f"norm at {text.write}, from which on the change is found at {text.read}; by share of tokens"
    )


@organism_app.command("list")
def organism_list(
    json: Json = False,
    blind: Annotated[
        bool, typer.Option("--blind", help="The key of blinded ids; keep it from who is to guess.")
    ] = False,
    salt: Annotated[str, typer.Option(help="Text that the blinded ids depend on.")] = "tunediff",
) -> None:
    """List the organisms that tunediff can make."""
    from tunediff.lab import organisms

    if blind:
        rows = sorted(({"id": o.blinded(salt), "name": o.name} for o in organisms.every()), key=lambda row: row["id"])
    else:
        rows = [
            {
                "name": o.name,
                "base": o.base,
                "behaviors": ", ".join(f"{b.name} ({'wanted' if b.wanted else 'unwanted'})" for b in o.behaviors)
                or "none",
                "summary": o.summary,
            }
            for o in organisms.every()
        ]
    typer.echo(to_json(rows, indent=1) if json else _table(rows))


OrganismName = Annotated[str, typer.Argument(help="As `tunediff organism list` prints it.")]
BaseModel = Annotated[str, typer.Option("--base", help="Base model folder.")]


@organism_app.command("make")
def organism_make(
    name: OrganismName,
    out: Path,
    base: BaseModel = "default",
    seed: Annotated[int, typer.Option(help="Seeds the examples, the start and their order.")] = 0,
    quiet: Quiet = False,
) -> None:
    """Train an organism from its recipe, measure it, and write the tune with its card to OUT."""
    _hush(quiet)
    from tunediff.core.progress import ProgressBar
    from tunediff.lab import organisms
    from tunediff.lab.organisms.training import make

    organism, progress = organisms.named(name).seeded(seed), ProgressBar(enabled=not quiet)
    card = make(organism, base, out, progress)
    progress.close()
    typer.echo(to_json(card, indent=1))


@organism_app.command("check")
def organism_check(
    name: OrganismName, folder: Path, base: BaseModel = "default", json: Json = False, quiet: Quiet = False
) -> None:
    """Measure a tune of this organism: behaviors, leaks and health, base beside tuned; writes its card anew."""
    _hush(quiet)
    from tunediff.lab import organisms
    from tunediff.lab.organisms.training import check, health

    card = check(organisms.named(name), base, folder)
    typer.echo(to_json(card, indent=1) if json else _table(health(card)))


def main() -> None:
    """Entry point: errors that a user can act on are told in four lines and exit with 2."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    pages.keep()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal that cannot show a character, or a name that is no text
            stream.reconfigure(errors="backslashreplace")
    if not sys.warnoptions:
        warnings.simplefilter("ignore", FutureWarning)  # of other libraries; nothing a user could act on
    try:
        code = app(standalone_mode=False)
        if code == 130:  # what typer makes of Ctrl-C
            raise KeyboardInterrupt
        sys.exit(code)
    except TunediffError as error:
        from tunediff.core.text import visible

        typer.echo("error: " + "\n".join(map(visible, error.lines())), err=True)
        sys.exit(2)
    except (typer.Abort, KeyboardInterrupt):
        typer.echo("stopped; run the same command again to go on", err=True)
        sys.exit(130)
    except Exception as error:
        if hasattr(error, "show") and hasattr(error, "exit_code"):  # usage, of typer's click or of click's own
            error.show()
            sys.exit(error.exit_code)
        if os.environ.get("TUNEDIFF_DEBUG"):
            raise
        from tunediff.core.text import visible

        first = (str(error).strip().splitlines() or [""])[0]
        typer.echo(
            f"error: {type(error).__name__}: {visible(first[:300])}\n  expected: no such error; this is a fault in tunediff\n"
            "  try: TUNEDIFF_DEBUG=1 shows where it happened",
            err=True,
        )
        sys.exit(3)


if __name__ == "__main__":
    main()
