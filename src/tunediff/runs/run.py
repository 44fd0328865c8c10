"""Run: a plan carried out, from two models to changes on trial, their edits with bills, and one record of it all."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tunediff.core.artifacts import refuse_changed, to_json
from tunediff.core.axes import MODELS
from tunediff.core.errors import ArtifactError, SettingError, SourceError, TunediffError
from tunediff.core.progress import Progress, quiet
from tunediff.core.text import NAME_LENGTH, slug
from tunediff.core.typed import read_toml
from tunediff.edits import bills
from tunediff.edits.baking import bake_edit, check_empty
from tunediff.edits.edit import Edit
from tunediff.edits.reverting import Inputs
from tunediff.models.pair import Pair
from tunediff.records.change import Change
from tunediff.records.diff import Bill, Diff
from tunediff.reports.page import write_report
from tunediff.runs.findings import collected
from tunediff.runs.plan import Plan, resolved, settled, to_record
from tunediff.runs.stages import Stages

PLAN = "plan.toml"
"""The plan of the last command, in a run's folder."""
STRENGTHS = (30.0, 10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.003)
"""Values of `EditSettings.strength` to try, in this order, when a cost is given."""


class Run(Stages):
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

    def __post_init__(self) -> None:
        super().__post_init__()
        self._edits: dict[tuple[str, ...], tuple[Edit, list[Edit]]] = {}

    def change(self, id: str) -> Change:
        """The candidate with this id; raises `SettingError` naming the confirmed ones if there is none."""
        by_id: dict[str, Change] = {c.id: c for c in (*self.changes, *self.output_side.changes)}
        if id not in by_id and any(record.id == id for record in self.output_side.records):
            raise SettingError(
                f"{id} is a change at the output: it claims tokens, and no map of a block holds it",
                expected="a change of streams: " + (", ".join(self.undoable) or "(none was confirmed)"),
                remedy=f"--changes {self.undoable[0]}" if self.undoable else "",
            )
        if id not in by_id:
            expected = ", ".join(self.undoable) or "(none was confirmed)"
            raise SettingError(f"this run has no change {id!r}", expected=expected)
        return by_id[id]

    def inputs(self, ids: Sequence[str]) -> list[dict[str, Inputs]]:
        """What an edit that removes these changes is computed from (see `bills.inputs`), on training text.

        The inputs are not kept on disk, because they may be as large as the model.
        """
        plan, changes, train, neutral = self.plan, [self.change(i) for i in ids], self.train, None
        if self.written and not all(train.strength(c).any() for c in changes):
            train = self.taken("train", 10**9, ())  # on the models' own text the edit would do nothing
        elif self.written and self.plain:
            neutral = self.taken("train", plan.edit.tokens // 3, self.plain)
        with self.pair.running():
            return bills.inputs(self.pair, changes, train, neutral, plan.edit, plan.seed)

    def edit(self, ids: Sequence[str]) -> tuple[Edit, list[Edit]]:
        """The edit that removes these changes, and its controls; computed once a run and kept in memory."""
        if tuple(ids) not in self._edits:
            self.progress("revert", 0, 1)
            self._edits[tuple(ids)] = bills.removing(self.pair, ids, self.inputs(ids), self.plan.edit, self.plan.seed)
            self.progress("revert", 1, 1)
        return self._edits[tuple(ids)]

    def afford(self, ids: Sequence[str], cost: float) -> float | None:
        """Set the plan to remove these changes as strongly as `cost` allows, in nats a token on held-out neutral text.

        Returns the edit's cost. Returns None and leaves the plan as it is if even the weakest edit costs more.
        """
        if not self.plain or not self.neutral.rows:
            raise SettingError(
                "there is no held-out text that the models did not write",
                expected="neutral text to measure a cost on",
                remedy="leave --cost out, or --set corpus.tokens=20000",
            )
        inputs, seed = self.inputs(ids), self.plan.seed
        for number, strength in enumerate(STRENGTHS):
            self.progress("afford", number, len(STRENGTHS))
            settings = dataclasses.replace(self.plan.edit, strength=strength)
            alone, _ = bills.removing(self.pair, ids, inputs[:1], dataclasses.replace(settings, controls=0), seed)
            (paid,) = bills.costs(self.pair, [alone], self.neutral)
            if paid <= cost:
                self.progress("afford", len(STRENGTHS), len(STRENGTHS))
                self.plan = dataclasses.replace(self.plan, edit=settings)
                self._edits = {tuple(ids): bills.removing(self.pair, ids, inputs, settings, seed)}
                return paid
        return None

    def bill(self, ids: Sequence[str]) -> Bill:
        """The bill of removing these changes: its effect and its cost, on held-out text."""
        plan = self.plan

        def make() -> Bill:
            edit, controls = self.edit(ids)
            changes = [self.change(i) for i in ids]
            with self.pair.running():
                return bills.bill(self.pair, edit, controls, changes, self.sample, self.neutral, plan.edit, plan.seed)

        place = self.keeper.at(
            "revert", self.harvest.fingerprint, self.found_key, plan.rank, plan.edit, list(ids), plan.seed
        )
        bill: Bill = self.keeper.kept_json(
            place, Bill, "bill.json", lambda _: make(), lambda _: "without " + ", ".join(ids)
        )
        return bill

    @property
    def confirmed(self) -> list[str]:
        """The ids of the confirmed changes, in the order of the ranking."""
        return [r.id for r in self.verdicts if r.decision == "confirmed"]

    @property
    def undoable(self) -> list[str]:
        """The ids of the confirmed changes that `revert` takes out by itself: those of streams that claim no tokens, else
        those that raise or lower tokens by what they write into a stream."""
        confirmed = [r for r in self.verdicts if r.decision == "confirmed" and not r.is_at_output]
        return [r.id for r in confirmed if not r.standing] or [r.id for r in confirmed]

    def revert(self, ids: Sequence[str] = (), cost: float | None = None, bake: Path | None = None) -> Bill:
        """Remove changes from the tuned model, and return the bill: the edit's effect and cost.

        ids    changes to remove; all confirmed ones of streams if empty
        cost   largest cost in nats a token on neutral text; without it ``edit.strength`` is used
        bake   folder to write the edited model to; it must be empty or not exist

        Raises `SettingError` if there is nothing to remove, or no edit keeps to the cost.
        """
        if bake is not None:
            check_empty(bake)  # now, as the bill takes a while
        ids = list(ids) or self.undoable
        if not ids and self.confirmed:
            raise SettingError(f"revert takes out changes of streams; only {', '.join(self.confirmed)} was confirmed")
        if not ids:
            raise SettingError(
                "this run confirmed no change, so there is nothing to take out", remedy="name one with --changes ID"
            )
        if cost is not None and self.afford(ids, cost) is None:
            raise SettingError(
                f"no edit takes {', '.join(ids)} out at {cost:g} nat a token on neutral text",
                expected="a higher --cost",
                remedy="name fewer with --changes",
            )
        bill = self.bill(ids)
        if bake is not None:
            bake_edit(self.pair, self.edit(ids)[0], bill, bake)
        return bill

    def undo(self) -> list[Bill]:
        """The bills of removing the first ``edit.bills`` confirmed changes of streams, one bill for each change.

        A bill that cannot be made says so; the others go on.
        """
        return [self._told([id]) for id in self.undoable[: self.plan.edit.bills]]

    def _told(self, ids: Sequence[str]) -> Bill:
        try:
            return self.bill(ids)
        except ArtifactError:
            raise  # a folder that is damaged or full is refused, as it is in every other stage
        except TunediffError as error:
            said = "; ".join(error.lines())
        except Exception as error:  # the finding stands, whatever went wrong in pricing it
            if os.environ.get("TUNEDIFF_DEBUG"):
                raise
            said = f"{type(error).__name__}: {error}; this is a fault in tunediff (TUNEDIFF_DEBUG=1 shows where)"
        return Bill("revert", "revert", list(ids), [], " ".join(said.split()))

    def conclude(self, undo: bool = True) -> Diff:
        """Publish the finding, and where `undo` says so, price undoing it and publish again.

        The finding is on disk before anything is priced, so that a crash or an interrupt meanwhile loses nothing.
        """
        diff = self.publish(billing=undo and bool(self.undoable))
        bills = self.undo() if undo else []
        return self.publish(bills) if bills else diff

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
