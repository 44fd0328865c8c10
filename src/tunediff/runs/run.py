"""Run: a plan carried out, from two models to changes on trial, their edits with bills, and one record of it all."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tunediff.core.artifacts import refuse_changed, to_json
from tunediff.core.axes import MODELS
from tunediff.core.errors import ArtifactError, SettingError, SourceError
from tunediff.core.progress import Progress, quiet
from tunediff.core.text import NAME_LENGTH, slug
from tunediff.core.typed import read_toml
from tunediff.models.pair import Pair
from tunediff.records.diff import Bill, Diff
from tunediff.reports.page import write_report
from tunediff.runs.findings import collected
from tunediff.runs.plan import Plan, resolved, settled, to_record
from tunediff.runs.undoing import Undoing

PLAN = "plan.toml"
"""The plan of the last command, in a run's folder."""


class Run(Undoing):
    """One plan carried out in its folder: stages by their names, edits that take changes out, and the finding."""

    @classmethod
    def begin(
        cls, plan: Plan, runs: Path, name: str | None = None, progress: Progress = quiet, given: Pair | None = None
    ) -> Run:
        """The run of `plan` in ``runs/NAME``, begun or gone on with; by default NAME is made from the models' names.

        Raises `SettingError` for a name that is not file-safe, `ArtifactError` for a folder that belongs to another
        pair or cannot be made.
        """
        name = name or slug(f"{Path(plan.base).name}-{Path(plan.tuned).name}")
        if slug(name) != name:
            expected = "letters, digits, dot, dash, underscore"
            raise SettingError(f"{name!r} is not a run name", expected=expected, remedy=f"--run {slug(name)}")
        folder = runs / name
        if (folder / PLAN).is_file():  # of another version's plan no more is asked than whose it is, as it is replaced
            before = {**to_record(Plan()), **read_toml(folder / PLAN)}
            was, now = [str(before["base"]), str(before["tuned"])], [plan.base, plan.tuned]
            if not all(map(_same, was, now)):
                raise ArtifactError(
                    f"{folder} belongs to another pair",
                    expected=" and ".join(was),
                    got=" and ".join(now),
                    remedy=f"--run {slug(name)[: NAME_LENGTH - 2]}-2",
                )
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            fault = error.strerror or str(error)
            raise ArtifactError(f"{folder} cannot be made", got=fault, remedy="--runs FOLDER") from None
        return cls(plan, folder, progress, given)

    @classmethod
    def open(
        cls,
        folder: Path,
        settings: Sequence[str] | Mapping[str, Any] = (),
        allow_code: bool = False,
        progress: Progress = quiet,
    ) -> Run:
        """The run in `folder`, wherever it was moved to, under its own plan with `settings` changed (see `settled`).

        Raises `SourceError` if a model or text is not any more where the plan says; it names the setting to change.
        """
        refuse_changed(folder / PLAN, f"tunediff diff BASE TUNED --run {folder.name}, which writes it again")
        before = read_toml(folder / PLAN)
        models = {side: _beside(folder, before[side]) for side in MODELS if isinstance(before.get(side), str)}
        plan = settled(folder / PLAN, settings, allow_code, **models)
        if lacking := [side for side in MODELS if side not in models]:
            raise ArtifactError(
                f"{folder / PLAN} names no {' and no '.join(lacking)}",
                expected="the whole plan of a run",
                remedy=f"tunediff diff BASE TUNED --run {folder.name}, which writes it again",
            )
        places: dict[str, tuple[str, ...]] = {"base": (plan.base,), "tuned": (plan.tuned,)}
        places |= {"corpus.paths": plan.corpus.paths, "corpus.prompts": plan.corpus.prompts}
        gone = {name: path for name, paths in places.items() for path in paths if _is_gone(path)}
        if gone:
            raise SourceError(
                f"{next(iter(gone.values()))} does not exist any more",
                expected="what this run was made of",
                got="nothing there",
                remedy=" ".join(f"--set {name}=PATH" for name in gone),
            )
        return cls(plan, folder, progress)

    def conclude(self, undo: bool = True) -> Diff:
        """Publish the finding, and where `undo` says so, price undoing it and publish again.

        The finding is on disk before anything is priced, so that a crash or an interrupt meanwhile loses nothing.
        """
        diff = self.publish(billing=undo and bool(self.undoable))
        billed = self.undo() if undo else []
        return self.publish(billed) if billed else diff

    def publish(self, billed: Sequence[Bill] = (), billing: bool = False) -> Diff:
        """Write ``diff.json`` and ``report.html`` into the run's folder, and return the record.

        A record that is there and differs only in seconds stays, so that nothing is written to a read-only disk. With
        `billing`, when bills are to come, so does one that differs in its bills.
        """
        diff, path = self.diff(billed), self.folder / "diff.json"
        try:
            before = Diff.load(path)
        except ArtifactError:
            before = None
        if before is not None and _lasting(before, billing) == _lasting(diff, billing):
            diff = before
        else:
            diff.save(path)
        write_report(diff, self.folder / "report.html")
        return diff

    def diff(self, billed: Sequence[Bill] = ()) -> Diff:
        """All results as one record, with the given bills."""
        return collected(self, billed)


def _beside(folder: Path, name: str) -> str:
    """A model's name in a plan; a path that an older version kept as it was typed is looked for where it was typed."""
    typed_at = os.path.join(folder.resolve().parent.parent, name)
    return typed_at if os.path.exists(typed_at) and not os.path.exists(os.path.expanduser(name)) else name


def _is_gone(path: str) -> bool:
    """Whether a place that a plan holds from the root is not there; patterns of names are left to their reader."""
    return path.startswith("/") and not any(c in path for c in "*?[") and not os.path.exists(path)


def _same(was: str, now: str) -> bool:
    """Whether two plans name one model: one place, or a place from which the model of that name has moved."""
    moved = now.startswith("/") and Path(was).name == Path(now).name and not os.path.exists(was)
    return moved or resolved(was) == resolved(now)


def _lasting(diff: Diff, billing: bool) -> str:
    """A record as text without the seconds of its stages; with `billing`, also without its bills."""
    stages = [dataclasses.replace(s, seconds=0.0) for s in diff.stages if not (billing and s.name == "revert")]
    return to_json(dataclasses.replace(diff, stages=stages, bills=[] if billing else diff.bills))
