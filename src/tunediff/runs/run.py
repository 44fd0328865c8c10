"""Run: a plan carried out, from two models to changes on trial, their edits with bills, and one record of it all."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from tunediff.core.errors import SettingError
from tunediff.edits import bills
from tunediff.edits.edit import Edit
from tunediff.edits.reverting import Moments
from tunediff.models.fast.layers import frozen
from tunediff.records.change import Change
from tunediff.records.diff import Bill, Diff
from tunediff.runs.findings import finding
from tunediff.runs.stages import Stages

STRENGTHS = (30.0, 10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.003)
"""Values of `EditSettings.strength` that are tried, in this order, where a cost is given."""


class Run(Stages):
    """One plan carried out in its folder: stages by their names, edits that take changes out, and the finding."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._edits: dict[tuple[str, ...], tuple[Edit, list[Edit]]] = {}

    def change(self, id: str) -> Change:
        """The candidate of that id; raises `SettingError` naming the confirmed ones if there is none."""
        by_id = {c.id: c for c in self.changes}
        if id not in by_id:
            confirmed = [r.id for r in self.verdicts if r.decision == "confirmed"]
            raise SettingError(
                f"this run has no change {id!r}", expected=", ".join(confirmed) or "(none was confirmed)"
            )
        return by_id[id]

    def inputs(self, ids: Sequence[str]) -> list[dict[str, Moments]]:
        """What an edit that takes these changes out follows from (see `bills.inputs`), of training text.

        It is not kept on disk, as it may be as large as the model.
        """
        plan, changes, train, neutral = self.plan, [self.change(i) for i in ids], self.train, None
        if self.written and not all(train.strength(c).any() for c in changes):
            train = self.taken("train", 10**9, ())  # in what the models wrote the edit would silently do nothing
        elif self.written and self.plain:
            neutral = self.taken("train", plan.edit.tokens // 3, self.plain)
        with frozen():
            return bills.inputs(self.pair, changes, train, neutral, plan.edit, plan.seed)

    def edit(self, ids: Sequence[str]) -> tuple[Edit, list[Edit]]:
        """The edit that takes these changes out, and its controls; computed once a run in memory."""
        if tuple(ids) not in self._edits:
            self.progress("revert", 0, 1)
            self._edits[tuple(ids)] = bills.removing(self.pair, ids, self.inputs(ids), self.plan.edit, self.plan.seed)
            self.progress("revert", 1, 1)
        return self._edits[tuple(ids)]

    def afford(self, ids: Sequence[str], cost: float) -> float | None:
        """Let the plan take these changes out as strongly as `cost` allows, in nats a token on held-out neutral text.

        Returns what that costs; None, and nothing changes, where even the weakest edit costs more.
        """
        if not self.plain or not self.neutral.rows:
            raise SettingError(
                "there is no held-out text that the models did not write",
                expected="neutral text to measure a cost on",
                remedy="a corpus with more documents, or no cost",
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
        """What taking these changes out does and costs, on held-out text."""
        plan = self.plan

        def make() -> Bill:
            edit, controls = self.edit(ids)
            changes = [self.change(i) for i in ids]
            with frozen():
                return bills.bill(self.pair, edit, controls, changes, self.sample, self.neutral, plan.edit, plan.seed)

        place = self.keeper.at(
            "revert", self.harvest.fingerprint, self.found_key, plan.rank, plan.edit, list(ids), plan.seed
        )
        bill: Bill = self.keeper.kept_json(
            place, Bill, "bill.json", lambda _: make(), lambda _: "without " + ", ".join(ids)
        )
        return bill

    def diff(self, billed: Sequence[Bill] = ()) -> Diff:
        """Everything, as one record, with the bills that were drawn up."""
        return finding(self, billed)
