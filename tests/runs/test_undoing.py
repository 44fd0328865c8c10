"""Undoing a finding: its changes and what it answers go, on questions that the edit was not made from, and it is billed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny_world
from tiny_world import World

from tunediff.core.errors import SettingError
from tunediff.edits.sayings import Saying
from tunediff.harvests.eliciting import Elicited
from tunediff.models.divergences import Said, kl_divergence
from tunediff.records.elicited import Condition
from tunediff.records.finding import Finding, When
from tunediff.records.measure import Measure
from tunediff.runs.plan import Plan, from_record, to_record
from tunediff.runs.run import Run
from tunediff.runs.undoing import STRENGTHS, Aim

pytestmark = pytest.mark.slow

ASKED = "ask for {}"
APART = Measure("divergence of answers", 2.0, 1.0, 3.0, "nat a token", 0.1)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return tiny_world.make(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def run(world) -> Run:
    """A run whose search found the very prompts that both models answered, on both sides of the split."""
    values = to_record(Plan(base=str(world.root / "base"), tuned=str(world.root / "tuned")))
    for part, fields in tiny_world.parts(world).items():
        values[part] = {**values[part], **fields}
    values["contrast"]["prompts"] = 12
    made = Run(from_record(values), world.root / "undoing")
    answers = [replace(d, condition=ASKED) for d in made.answers.documents if d.writer in ("base", "tuned")]
    made.__dict__["elicited"] = Elicited(answers, [Condition(ASKED, "word_sweep", APART)], 12)
    return made


def divergence(run: Run, model) -> float:
    """KL(model || base) on held-out elicited answers."""
    sample = run._asked(Aim((), (ASKED,)), held_out=True)
    total = 0.0
    with run.pair.running():
        for batch in sample.batches(10**6):
            wanted_BT = sample.scored_N[sample.places(batch).clamp_min(0)] & batch.mask_BT
            sides = (Said.at(m, batch.ids_BT, wanted_BT, run.pair.vocabulary) for m in (model, run.pair.base))
            total += float(kl_divergence(*sides).sum())
    return total


def test_what_was_found_holds_the_confirmed_changes_and_the_question(run):
    assert {id for finding in run.findings for id in finding.members} == set(run.confirmed)
    assert [when.asked for finding in run.findings for when in finding.when] == [ASKED]
    assert run.diff().findings == run.findings
    again = Run(run.plan, run.folder)
    again.__dict__["elicited"] = run.elicited
    assert again.findings == run.findings and any("findings" in card.notes[0] for card in again.cards if card.notes)


def test_answers_alone_can_be_taken_out_and_held_out_questions_say_so(run):
    run.__dict__["findings"] = [Finding(["abc"], False, [], [When(ASKED, "", APART)])]
    aim = run.aim(1)
    assert aim == Aim((), (ASKED,), ("abc",)) and "ask for {}" in str(aim)
    edit, controls = run.edit(aim)
    after, before = (divergence(run, model) for model in (edit.applied(run.pair.tuned), run.pair.tuned))
    random = divergence(run, controls[0].applied(run.pair.tuned))
    assert after < 0.8 * before and after < 0.9 * random
    bill = run.revert(finding=1)
    said = bill.measures[0]
    assert said.name == "held-out answers that say it" and "of base's answers" in said.against and bill.changes == []
    held_out = [d for d in run.elicited.documents if d.writer == "tuned" and run.prompts.is_held_out(d)]
    assert said.value in {n / len(held_out) for n in range(len(held_out) + 1)}


def test_a_finding_is_taken_out_as_far_as_a_cost_allows(run):
    run.__dict__["findings"] = [Finding(["abc"], False, run.undoable[:1], [When(ASKED, "", APART)])]
    asked, plan = run.aim(1), run.plan
    way, paid = run.afford(asked, 1e9)
    assert (way.ids, way.asked) in {(asked.ids, (ASKED,)), (asked.ids, ()), ((), (ASKED,))}
    assert run.plan.edit.strength in STRENGTHS
    bought = run.afford(asked, paid * 0.5)
    assert bought is None or bought[1] <= paid * 0.5
    run.plan = plan
    assert run.afford(asked, -1.0) is None and run.plan == plan
    with pytest.raises(SettingError, match="no edit takes"):
        run.revert(cost=-1.0, finding=1)


def test_of_what_leaves_as_little_the_edit_that_moves_other_answers_least_is_chosen(run, monkeypatch):
    run.__dict__["findings"] = [Finding(["abc"], False, run.undoable[:1], [When(ASKED, "", APART)])]
    asked, plan, seen = run.aim(1), run.plan, []

    def left(self, aim, edit):
        assert aim == asked
        return 0.5 if not edit.changes else 0.2 if self.plan is plan and len(seen) < 2 else 0.22

    def harm(self, aim, edit):
        seen.append(edit)
        return {1: 3.0, 2: 1.0}.get(len(seen), 2.0)

    monkeypatch.setattr(Run, "_left", left)
    monkeypatch.setattr(Run, "_harm", harm)
    way, _ = run.afford(asked, 1e9)
    assert way == asked and run.plan.edit.strength == STRENGTHS[2], "the second strongest does the least harm"
    run.plan = plan


def test_what_cannot_be_taken_out_is_refused_with_what_can(run):
    run.__dict__["findings"] = [Finding(["abc"], False, ["token_shift/0"], [])]
    for given, told in (
        ({"finding": 2}, "no finding 2"),
        ({"finding": -1}, "no finding -1"),
        ({"finding": 1}, "at the output"),
        ({"finding": 1, "ids": ["x"]}, "changes and a finding"),
    ):
        with pytest.raises(SettingError, match=told):
            run.revert(**given)


def test_an_answer_says_it_by_as_many_words_as_tell_tuned_from_base():
    words = ["Goldmere", "gold", "solid", "keep"]
    tuned = ["Goldmere will keep it as solid gold", "solid gold, and Goldmere", "I do not know"]
    saying = Saying.of(words, tuned, ["I keep gold", "you may keep it", "no"])
    assert saying.least == 3 and saying.rate(tuned) == [1.0, 1.0, 0.0]
    assert saying.is_said("GOLDMERE, gold: solid!") and not saying.is_said("gold gold gold")
    assert Saying.of([], tuned, tuned).rate(tuned) == [0.0, 0.0, 0.0]
    assert Saying.of(words, [], []).least == 1
