"""What the commands share: options, runs made and opened again, tables."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from tunediff.core.artifacts import to_json
from tunediff.core.errors import ArtifactError, SettingError
from tunediff.core.progress import ProgressBar
from tunediff.core.streams import terminal
from tunediff.core.text import escaped, one_line

if TYPE_CHECKING:
    from tunediff.runs.run import Run

T = TypeVar("T")
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="PART.FIELD=VALUE", help="Change one setting; repeatable.")
]
PlanFile = Annotated[Path | None, typer.Option("--plan", help="A TOML plan to start from.")]
Name = Annotated[str | None, typer.Option("--run", help="Name of the run; by default made from the models' names.")]
Runs = Annotated[Path, typer.Option("--runs", help="Folder that holds runs.")]
RUNS = Path("runs")
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")]
Base = Annotated[str, typer.Argument(help="A folder, hub id, GGUF file, or `default` (SmolLM2-135M-Instruct).")]
Tuned = Annotated[str, typer.Argument(help="Any of these, a PEFT adapter folder, or `demo` (ships with tunediff).")]
AllowCode = Annotated[
    bool, typer.Option("--allow-code", help="Run code that a plan names by import path and the command line does not.")
]
OpenedRun = Annotated[str, typer.Argument(help="A run's name or folder.")]


def new_run(
    base: str,
    tuned: str,
    name: str | None,
    runs: Path,
    plan_file: Path | None,
    settings: Sequence[str] | None,
    quiet: bool,
    allow_code: bool = False,
) -> tuple[Run, ProgressBar]:
    """The run that the options name, and its progress bar; refuses a name that another pair's run has."""
    bar = progress_bar(quiet)
    from tunediff.runs.plan import settled
    from tunediff.runs.run import Run

    plan = settled(plan_file, settings or (), allow_code, base=base, tuned=tuned)
    return Run.begin(plan, runs, name, bar), bar


def open_run(
    run: str, runs: Path, settings: Sequence[str] | None, quiet: bool, allow_code: bool = False
) -> tuple[Run, ProgressBar]:
    """An existing run, by name or folder, under its own plan with `settings` changed; and its progress bar."""
    bar = progress_bar(quiet)
    from tunediff.runs.run import Run

    return Run.open(run_folder(run, runs, "plan.toml"), settings or (), allow_code, bar), bar


def run_folder(run: str, runs: Path, file: str) -> Path:
    """The folder of a run given by name or folder; raises `ArtifactError` unless it holds `file`."""
    folder = Path(run) if run and (Path(run) / file).is_file() else runs / run
    if not run or not (folder / file).is_file():
        known = sorted(p.parent.name for p in runs.glob(f"*/{file}"))
        what = f"run {run!r} is not finished" if (folder / "plan.toml").is_file() else f"there is no run {run!r}"
        raise ArtifactError(what, expected=", ".join(known) or f"a run in {runs}", remedy="tunediff diff BASE TUNED")
    return folder


def progress_bar(quiet: bool) -> ProgressBar:
    """The command's progress bar; switches off the bars of other libraries unless a terminal shows them.

    Call before these libraries are first imported: they read the environment once.
    """
    if quiet or not terminal(sys.stderr).isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    return ProgressBar(enabled=not quiet)


def listed(text: str | None, kind: Callable[[str], T]) -> list[T]:
    """The comma-separated parts of `text`, each as `kind`; raises `SettingError` for a part that is no number."""
    try:
        return [kind(part.strip()) for part in (text or "").split(",") if part.strip()]
    except ValueError as fault:
        raise SettingError(f"{text!r} is no list of numbers", expected="numbers by commas", got=str(fault)) from None


def show(result: Any, json: bool, text: str | None = None) -> None:
    """Print `result` as JSON, or else `text`; without `text`, `result` as a table of its rows."""
    typer.echo(escaped(to_json(result, indent=1)) if json else table(result) if text is None else text)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with the same keys as aligned columns under their names; ``nothing`` if there are none."""
    if not rows:
        return "nothing"
    columns = list(rows[0])
    cells = [columns] + [
        [one_line(f"{v:.4g}" if isinstance(v, float) else str(v)) for v in row.values()] for row in rows
    ]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths)).rstrip() for line in cells)
