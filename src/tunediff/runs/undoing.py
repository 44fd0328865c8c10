"""Undoing: edits that take changes or a whole finding out of tuned, each with its bill."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tunediff.core.chance import proportion
from tunediff.core.errors import ArtifactError, SettingError, TunediffError
from tunediff.edits import bills
from tunediff.edits.baking import bake_edit, check_empty
from tunediff.edits.edit import Edit, EditSettings
from tunediff.edits.reverting import Inputs
from tunediff.edits.sayings import Saying, answers
from tunediff.harvests.asking import Asking
from tunediff.harvests.samples import Sample
from tunediff.records.change import Change
from tunediff.records.diff import Bill
from tunediff.records.measure import Measure
from tunediff.runs.stages import Stages
from tunediff.texts.document import Document

STRENGTHS = (30.0, 10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.003)
"""Values of `EditSettings.strength` to try, in this order, when a cost is given."""


ABOUT = 0.05
"""Share of answers by which two edits may differ that leave about as many."""
OTHERS = 800
"""Approximate number of training tokens on which an edit's harm to other answers is measured."""


@dataclass(frozen=True)
class Aim:
    """What an edit takes out: changes by their ids, and what tuned answers to sorts of questions.

    words   the words by which such an answer is told
    """

    ids: tuple[str, ...] = ()
    asked: tuple[str, ...] = ()
    words: tuple[str, ...] = ()

    def __str__(self) -> str:
        return ", ".join(self.ids) or "what tuned answers to " + ", ".join(map(repr, self.asked))


@dataclass(frozen=True)
class _Tried:
    """One way to take a finding out, at one strength: its cost, what it leaves, and its harm to other answers."""

    way: Aim
    settings: EditSettings
    paid: float
    left: float
    harm: float


class Undoing(Stages):
    """A run's edits: computed once and kept in memory, their bills on disk."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._edits: dict[Aim, tuple[Edit, list[Edit]]] = {}

    def change(self, id: str) -> Change:
        """The candidate with this id; raises `SettingError` naming the confirmed ones if there is none."""
        by_id = self.in_streams
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

    def aim(self, number: int) -> Aim:
        """What takes a finding out, by its place in `findings` from 1 on; raises `SettingError` where nothing does."""
        if not 1 <= number <= len(self.findings):
            raise SettingError(
                f"this run has no finding {number}",
                expected=f"1 to {len(self.findings)}" if self.findings else "(nothing was found)",
            )
        finding = self.findings[number - 1]
        changes = self.in_streams
        members = [changes[id] for id in finding.members if id in changes]
        # What is read everywhere does not say where to give base's maps back; answers, or other changes, do.
        here = [change for change in members if change.threshold > float("-inf") and change.rows_SMD.any()]
        ids = tuple(change.id for change in here or ([] if finding.when else members))
        if not ids and not finding.when:
            raise SettingError(
                f"finding {number} is at the output: it claims tokens, and no map of a block holds it",
                expected="a finding with a change of streams, or with questions on which it shows",
            )
        return Aim(ids, tuple(when.asked for when in finding.when), tuple(finding.words))

    def edit(self, aim: Aim | Sequence[str]) -> tuple[Edit, list[Edit]]:
        """The edit that takes changes, or a finding, out, and its controls; computed once a run and kept in memory."""
        aim = _aim(aim)
        if aim not in self._edits:
            self.progress("revert", 0, 1)
            inputs = self.inputs(aim)
            self._edits[aim] = bills.removing(self.pair, aim.ids, inputs, self.plan.edit, self.plan.seed)
            self.progress("revert", 1, 1)
        return self._edits[aim]

    def inputs(self, aim: Aim) -> list[dict[str, Inputs]]:
        """What an edit is computed from (see `bills.inputs`), on training text and training questions.

        The inputs are not kept on disk, because they may be as large as the model.
        """
        plan, changes, train, neutral = self.plan, [self.change(id) for id in aim.ids], self.train, None
        if self.written and changes and not all(train.strength(c).any() for c in changes):
            train = self.taken("train", 10**9, ())  # on the models' own text the edit would do nothing
        elif self.written and self.plain:
            neutral = self.taken("train", plan.edit.tokens // 3, self.plain)
        with self.pair.running():
            asked = self._asked(aim, held_out=False)
            return bills.inputs(self.pair, changes, train, neutral, plan.edit, plan.seed, asked=asked)

    def afford(self, aim: Aim | Sequence[str], cost: float) -> tuple[Aim, float] | None:
        """Set the plan to take changes, or a finding, out as strongly as `cost` allows, nat a token on held-out neutral text.

        A finding is taken out by its changes, by its answers, or by both, and no more strongly than it has to be: of what
        leaves about as few training answers that say it as can be, what moves other answers of training text least is
        chosen. Returns what is taken out and what that costs; None, and the plan stays as it is, where even the weakest
        edit costs more.
        """
        if not self.plain or not self.neutral.rows:
            raise SettingError(
                "there is no held-out text that the models did not write",
                expected="neutral text to measure a cost on",
                remedy="leave --cost out, or --set corpus.tokens=20000",
            )
        aim = _aim(aim)
        ways = [aim]
        if aim.asked and aim.ids:
            ways += [dataclasses.replace(aim, asked=()), dataclasses.replace(aim, ids=())]
        strengths = STRENGTHS[::2] if aim.asked else STRENGTHS  # each costs answers as well
        tried: list[_Tried] = []
        for place, way in enumerate(ways):
            inputs, first = self.inputs(way), len(tried)
            for number, strength in enumerate(strengths):
                self.progress("afford", place * len(strengths) + number, len(ways) * len(strengths))
                settings = dataclasses.replace(self.plan.edit, strength=strength)
                bare = dataclasses.replace(settings, controls=0)
                edit, _ = bills.removing(self.pair, way.ids, inputs[:1], bare, self.plan.seed)
                (paid,) = bills.costs(self.pair, [edit], self.neutral)
                if paid > cost:
                    continue
                left, harm = (self._left(aim, edit), self._harm(aim, edit)) if aim.asked else (0.0, 0.0)
                tried.append(_Tried(way, settings, paid, left, harm))
                if not aim.asked or left > min(one.left for one in tried[first:]) + ABOUT:
                    break  # weaker edits leave more
        self.progress("afford", len(ways) * len(strengths), len(ways) * len(strengths))
        if not tried:
            return None
        least = min(one.left for one in tried)
        best = min((one for one in tried if one.left <= least + ABOUT), key=lambda one: one.harm)
        self.plan = dataclasses.replace(self.plan, edit=best.settings)
        self._edits = {}
        if best.way == way:  # the last one's inputs are at hand
            self._edits[way] = bills.removing(self.pair, way.ids, inputs, best.settings, self.plan.seed)
        return best.way, best.paid

    def bill(self, aim: Aim | Sequence[str]) -> Bill:
        """The bill of taking changes, or a finding, out: its effect and its cost, on held-out text and questions."""
        plan, aim = self.plan, _aim(aim)

        def make() -> Bill:
            edit, controls = self.edit(aim)
            changes = [self.change(id) for id in aim.ids]
            with self.pair.running():
                made = bills.bill(self.pair, edit, controls, changes, self.sample, self.neutral, plan.edit, plan.seed)
                return dataclasses.replace(made, measures=[*self._said(aim, edit, controls), *made.measures])

        asked = [aim.asked, aim.words, self.elicited_key] if aim.asked else []
        place = self.keeper.at(
            "revert", self.harvest.fingerprint, self.found_key, plan.rank, plan.edit, list(aim.ids), plan.seed, *asked
        )
        bill: Bill = self.keeper.kept_json(place, Bill, "bill.json", lambda _: make(), lambda _: f"without {aim}")
        return bill

    # -- answers -------------------------------------------------------------------------------------------------

    def _asked(self, aim: Aim, held_out: bool) -> Sample | None:
        """Tuned's answers to an aim's questions on one side of the split; None where there are none."""
        if not aim.asked or self.asked is None:
            return None
        tokens = self.asked.tokens
        mine = [
            row
            for row in self.asked.rows
            if tokens.held_out[d := tokens.document_R[row]] == held_out and tokens.documents[d].condition in aim.asked
        ]
        return self.asked.only(mine) if mine else None

    def _answered(self, aim: Aim, held_out: bool, writer: str = "tuned") -> list[Document]:
        return [
            document
            for document in self.elicited.documents
            if document.writer == writer
            and document.condition in aim.asked
            and self.prompts.is_held_out(document) == held_out
        ]

    @property
    def _asking(self) -> Asking:
        elicit = self.plan.elicit
        return Asking(self.pair, self.template, elicit.tokens, elicit.batch, self.plan.seed, "elicit.tokens")

    def _saying(self, aim: Aim) -> Saying:
        """How an answer is told to say it, decided on training answers."""
        tuned, base = ([d.messages[-1][1] for d in self._answered(aim, False, writer)] for writer in ("tuned", "base"))
        return Saying.of(aim.words, tuned, base)

    def _left(self, aim: Aim, edit: Edit) -> float:
        """The share of training answers that say it after an edit."""
        with self.pair.running():
            texts = answers(self._asking, edit.applied(self.pair.tuned), self._answered(aim, held_out=False))
        rates = self._saying(aim).rate(texts)
        return sum(rates) / max(1, len(rates))

    def _harm(self, aim: Aim, edit: Edit) -> float:
        """KL(tuned || edited), nat a token, on training answers by tuned where the aim's changes and questions are not."""
        on = bills.on_rows(self.train, [self.change(id) for id in aim.ids], spread=True)
        tokens = self.train.tokens
        rows = [r for r, f in on.items() if not f.any() and tokens.documents[tokens.document_R[r]].writer == "tuned"]
        others = [self.train.only(rows[:: max(1, sum(len(tokens.rows[r]) for r in rows) // OTHERS)])] if rows else []
        asked = tuple(condition.asked for condition in self.elicited.conditions if condition.asked not in aim.asked)
        if (elsewhere := self._asked(Aim((), asked), held_out=False)) is not None:
            others.append(elsewhere)
        return sum(bills.costs(self.pair, [edit], sample)[0] for sample in others) / max(1, len(others))

    def _said(self, aim: Aim, edit: Edit, controls: Sequence[Edit]) -> list[Measure]:
        """How many held-out answers say what an aim's finding says: before, after, and after controls."""
        asked = self._answered(aim, held_out=True)
        if not asked or not aim.words:
            return []
        saying = self._saying(aim)
        random, elsewhere = (
            next((c for c in controls if c.name.startswith(kind)), None) for kind in (bills.RANDOM, bills.ELSEWHERE)
        )
        after = saying.rate(answers(self._asking, edit.applied(self.pair.tuned), asked))
        rates = {
            name: _mean(saying.rate(answers(self._asking, control.applied(self.pair.tuned), asked)))
            for name, control in ((bills.RANDOM, random), (bills.ELSEWHERE, elsewhere))
            if control is not None
        }
        before = _mean(saying.rate([d.messages[-1][1] for d in asked]))
        base = _mean(saying.rate([d.messages[-1][1] for d in self._answered(aim, True, "base")]))
        share = proportion(int(sum(after)), len(after))
        told = [f"{before:.0%} before, {base:.0%} of base's answers"]
        told += [f"{bills.ELSEWHERE} {rates[bills.ELSEWHERE]:.0%}"] if bills.ELSEWHERE in rates else []
        return [
            Measure(
                "held-out answers that say it",
                share.value,
                share.low,
                share.high,
                "share",
                rates.get(bills.RANDOM),
                f"{bills.RANDOM} of equal energy; {'; '.join(told)}; an answer says it with {saying.least} of its words",
            )
        ]

    # -- the verb ------------------------------------------------------------------------------------------------

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

    def revert(
        self, ids: Sequence[str] = (), cost: float | None = None, bake: Path | None = None, finding: int = 0
    ) -> Bill:
        """Take changes, or a whole finding, out of the tuned model, and return the bill: the edit's effect and cost.

        ids       changes to take out; all confirmed ones of streams if empty
        cost      largest cost in nats a token on neutral text; without it ``edit.strength`` is used
        bake      folder to write the edited model to; it must be empty or not exist
        finding   place of a finding from 1 on, in place of `ids`: all its changes, and what it answers to its questions

        Raises `SettingError` if there is nothing to take out, or no edit keeps to the cost.
        """
        if bake is not None:
            check_empty(bake)  # now, as the bill takes a while
        if finding and ids:
            raise SettingError("changes and a finding are named", expected="one of both", remedy="leave --changes out")
        aim = self.aim(finding) if finding else Aim(tuple(ids) or tuple(self.undoable))
        if not aim.ids and not aim.asked and self.confirmed:
            raise SettingError(f"revert takes out changes of streams; only {', '.join(self.confirmed)} was confirmed")
        if not aim.ids and not aim.asked:
            raise SettingError(
                "this run confirmed no change, so there is nothing to take out", remedy="name one with --changes ID"
            )
        if cost is not None:
            afforded = self.afford(aim, cost)
            if afforded is None:
                raise SettingError(
                    f"no edit takes {aim} out at {cost:g} nat a token on neutral text",
                    expected="a higher --cost",
                    remedy="name fewer with --changes",
                )
            aim = afforded[0]
        bill = self.bill(aim)
        if bake is not None:
            bake_edit(self.pair, self.edit(aim)[0], bill, bake)
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


def _aim(aim: Aim | Sequence[str]) -> Aim:
    return aim if isinstance(aim, Aim) else Aim(tuple(aim))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(1, len(values))
