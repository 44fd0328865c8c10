"""The command line: one command a question; results on stdout, progress on stderr, errors in four lines."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunediff.cli import endings, lab
from tunediff.cli.options import (
    RUNS,
    AllowCode,
    Base,
    Json,
    Name,
    OpenedRun,
    PlanFile,
    Quiet,
    Runs,
    Set,
    Tuned,
    listed,
    new_run,
    open_run,
    run_folder,
    show,
    table,
)
from tunediff.core import pages
from tunediff.core.errors import TunediffError
from tunediff.core.manifests import is_finished
from tunediff.core.progress import ProgressBar
from tunediff.core.streams import shown, terminal
from tunediff.core.text import NOT_MEASURED

if TYPE_CHECKING:
    from tunediff.records.diff import Diff
    from tunediff.records.measure import Measure
    from tunediff.runs.run import Run

LOG_WIDTH = 110
"""Columns of the summary where stdout is not a terminal."""

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Finds what fine-tuning changed inside a model, proves it by intervening, and undoes it.",
)


@app.command()
def diff(
    base: Base,
    tuned: Tuned,
    name: Name = None,
    runs: Runs = RUNS,
    plan: PlanFile = None,
    set_: Set = None,
    undo: Annotated[bool, typer.Option(help="Measure what undoing the top confirmed changes costs.")] = True,
    json: Json = False,
    exit_code: Annotated[
        bool, typer.Option("--exit-code", help="Exit with 1 if a change was confirmed, 0 if none was.")
    ] = False,
    quiet: Quiet = False,
    allow_code: AllowCode = False,
) -> None:
    """Find what changed between two models, prove it, measure what undoing it costs, and write a report."""
    run, bar = new_run(base, tuned, name, runs, plan, set_, quiet, allow_code)
    found = _show_finding(run, run.conclude(undo), bar, json).found
    if exit_code and found:
        raise typer.Exit(endings.FOUND)


def _show_finding(run: Run, diff: Diff, bar: ProgressBar, json: bool) -> Diff:
    """Print the record of a run, or its summary and where it is kept; return the record."""
    bar.close()
    if json:
        show(diff, json)
        return diff
    from rich.console import Console

    from tunediff.reports.terminal import summary_table

    screen = terminal(sys.stdout)
    Console(file=screen, width=None if screen.isatty() else LOG_WIDTH).print(summary_table(diff))
    typer.echo(f"report  {run.folder / 'report.html'}\nrecord  {run.folder / 'diff.json'}")
    return diff


def _stage(name: str, summary: str, rows_of: Callable[[Run], list[dict[str, Any]]]) -> None:
    """Add the command that runs the stages up to `name` and prints what came out."""

    @app.command(name, help=summary)
    def command(
        base: Base,
        tuned: Tuned,
        name: Name = None,
        runs: Runs = RUNS,
        plan: PlanFile = None,
        set_: Set = None,
        json: Json = False,
        quiet: Quiet = False,
        allow_code: AllowCode = False,
    ) -> None:
        run, bar = new_run(base, tuned, name, runs, plan, set_, quiet, allow_code)
        rows = rows_of(run)
        bar.close()
        show(rows, json)


def _harvest_rows(run: Run) -> list[dict[str, Any]]:
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


def _find_rows(run: Run) -> list[dict[str, Any]]:
    return [
        {"id": c.id, "sites": ", ".join(map(str, c.sites)), "share": c.share, "size": float(c.difference_SD.norm())}
        for c in run.changes
    ]


def _rank_rows(run: Run) -> list[dict[str, Any]]:
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


def _verify_rows(run: Run) -> list[dict[str, Any]]:
    return [{"rank": r.rank, "id": r.id, "decision": r.decision, "reason": r.reason} for r in run.verdicts]


_stage("harvest", "Run both models on the same text and store their streams at the chosen sites.", _harvest_rows)
_stage("find", "Propose candidate changes from the harvest.", _find_rows)
_stage("rank", "Order the candidates by score, and compare them with random fine-tunes of the same size.", _rank_rows)
_stage("verify", "Intervene on the top candidates, and compare with random directions of equal energy.", _verify_rows)


@app.command()
def revert(
    run: OpenedRun,
    changes: Annotated[
        str | None, typer.Option(help="Ids of changes to take out, comma-separated; default: all confirmed.")
    ] = None,
    finding: Annotated[
        int,
        typer.Option(
            help="A finding to take out, by its number in the summary: its changes, and its answers to the questions it shows on."
        ),
    ] = 0,
    cost: Annotated[
        float | None,
        typer.Option(
            help="Take them out as strongly as this many nats a token on neutral text allow; default: edit.strength.",
            min=0,
        ),
    ] = None,
    bake: Annotated[Path | None, typer.Option(help="Write the edited model as a Hugging Face folder.")] = None,
    runs: Runs = RUNS,
    set_: Set = None,
    json: Json = False,
    quiet: Quiet = False,
    allow_code: AllowCode = False,
) -> None:
    """Take changes out of the tuned model, print what that does and costs, and bake it into weights if asked."""
    opened, bar = open_run(run, runs, set_, quiet, allow_code)
    bill = opened.revert(listed(changes, str), cost, bake, finding)
    bar.close()
    show(bill, json, table(_bill_rows(bill.measures)))
    if bake is not None:
        typer.echo(f"baked   {bake}", err=json)


def _bill_rows(measures: Sequence[Measure]) -> list[dict[str, Any]]:
    return [
        {
            "measure": m.name,
            "value": _with_interval(m),
            "control": "" if m.control is None else f"{m.control:.3g}",
            "unit": m.unit,
            "against": m.against,
        }
        for m in measures
    ]


def _with_interval(m: Measure) -> str:
    if m.value is None:
        return NOT_MEASURED
    return f"{m.value:.3g}" + ("" if m.low is None else f" [{m.low:.3g}, {m.high:.3g}]")


@app.command()
def report(
    run: Annotated[str, typer.Argument(help="A run's name or folder, or a diff.json.")],
    runs: Runs = RUNS,
    out: Annotated[
        Path | None, typer.Option(help="The file to write; by default report.html beside diff.json.")
    ] = None,
) -> None:
    """Write the report again from a run's diff.json, without loading a model."""
    from tunediff.records.diff import Diff
    from tunediff.reports.page import write_report

    record = Path(run) if run.endswith(".json") else run_folder(run, runs, "diff.json") / "diff.json"
    target = out or record.with_name("report.html")
    write_report(Diff.load(record), target)
    typer.echo(str(target))


@app.command("list")
def list_(runs: Runs = RUNS, json: Json = False) -> None:
    """List runs, their pairs, and how far they have come."""
    show([_run_row(path.parent) for path in sorted(runs.glob("*/plan.toml"))], json)


def _run_row(folder: Path) -> dict[str, Any]:
    from tunediff.records.diff import Diff
    from tunediff.runs.plan import Plan

    try:
        plan = Plan.read(folder / "plan.toml")
    except TunediffError as error:
        return {"run": folder.name, "base": "", "tuned": "", "stages": "", "found": error.what}
    stages = [
        s for s in ("elicit", "harvest", "find", "rank", "verify") if any(is_finished(p) for p in folder.glob(f"{s}/*"))
    ]
    found = ""
    if (folder / "diff.json").is_file():
        try:
            found = f"{len(Diff.load(folder / 'diff.json').confirmed)} confirmed"
        except TunediffError as error:
            found = error.what
    return {"run": folder.name, "base": plan.base, "tuned": plan.tuned, "stages": " ".join(stages), "found": found}


@app.command()
def demo(runs: Runs = RUNS, set_: Set = None, json: Json = False, quiet: Quiet = False) -> None:
    """The main job on the embedded default: a real model, fine-tuned with a wanted and a hidden objective.

    Runs `diff default demo`, then asks, by tests fixed beforehand, whether each objective is named by a confirmed change,
    takes the hidden one out alone, and counts both behaviors before and after.
    """
    from tunediff.lab.demo import check

    run, bar = new_run("default", "demo", "demo", runs, None, set_, quiet)
    checked = check(run)
    _show_finding(run, run.publish(checked.bills), bar, json)
    if not json:
        typer.echo(checked.text)


for _verb in (lab.calibrate, lab.bench, lab.floor):
    app.command()(_verb)
app.add_typer(lab.organism_app, name="organism")


def main() -> None:
    """Run the command line: its output cannot steer a terminal, and whatever ends it is told and has its exit code."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    pages.keep()
    if not sys.warnoptions:
        warnings.simplefilter("ignore", FutureWarning)  # of other libraries; nothing a user could act on
    with shown():
        sys.exit(endings.code_of(lambda: app(standalone_mode=False)))


if __name__ == "__main__":
    main()
