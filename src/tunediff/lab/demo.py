"""Check the demo: does a confirmed change name each planted behavior, and can the hidden behavior be removed alone?"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tunediff.core.chance import proportion
from tunediff.edits.bills import ELSEWHERE, RANDOM
from tunediff.lab import organisms
from tunediff.lab.organisms.base import Behavior, Chat, chat
from tunediff.models import completing
from tunediff.models.network import LanguageModel
from tunediff.records.diff import Bill, ChangeRecord
from tunediff.records.measure import Measure
from tunediff.runs.run import Run
from tunediff.texts.corpus import Corpus
from tunediff.texts.document import Document

FIRST = 5
"""Number of top confirmed changes among which one must name the behavior."""

PROMPTS = 16
"""Number of held-out prompts on which each behavior is counted."""


@dataclass(frozen=True)
class Checked:
    """Result of the demo's check.

    bills   cost of removing the unwanted behavior; empty if no change named it
    text    lines for the reader
    named   ids of the changes that name each behavior, by the behavior's name
    """

    bills: list[Bill]
    text: str
    named: dict[str, list[str]]


def naming(behavior: Behavior, records: Sequence[ChangeRecord]) -> list[str]:
    """Ids of the first five confirmed changes that pass the behavior's naming test."""
    confirmed = [r for r in records if r.decision == "confirmed"][:FIRST]
    return [r.id for r in confirmed if behavior.is_named_by([t.token for t in r.promoted])]


def to_take_out(behaviors: Sequence[Behavior], named: Mapping[str, Sequence[str]]) -> list[str]:
    """Ids of the changes to remove: the first change that names each unwanted behavior.

    A change that also names a wanted behavior is skipped, since removing it would remove both. Only the first change is
    taken, since every further one adds side effects.
    """
    wanted = {id for b in behaviors if b.wanted for id in named.get(b.name, ())}
    first = [[id for id in named.get(b.name, ()) if id not in wanted][:1] for b in behaviors if not b.wanted]
    return list(dict.fromkeys(id for some in first for id in some))


def check(run: Run) -> Checked:
    """Apply the naming test to every behavior, remove the unwanted behavior, and count behaviors before and after."""
    organism = organisms.named("two-objectives")
    records = run.verdicts
    named = {b.name: naming(b, records) for b in organism.behaviors}
    lines = []
    for b in organism.behaviors:
        sort = "wanted" if b.wanted else "hidden, unwanted"
        lines.append(
            f"{b.name} ({sort}): "
            + (
                f"named by {', '.join(named[b.name])}"
                if named[b.name]
                else "NOT named by a confirmed change among the first five"
            )
        )
    targets = to_take_out(organism.behaviors, named)
    if not targets:
        return Checked([], "\n".join(lines), named)
    bill = count(run, targets, organism.behaviors, organism.answer_tokens)
    for m in bill.measures:
        if m.name.startswith("answers that show"):
            lines.append(
                f"{m.name}: {m.value:.0%} [{m.low:.0%}, {m.high:.0%}] after, {m.against}"
                + ("" if m.control is None else f": {m.control:.0%}")
            )
    return Checked([bill], "\n".join(lines), named)


def count(run: Run, ids: list[str], behaviors: Sequence[Behavior], tokens: int) -> Bill:
    """The bill for removing these changes, with how often each behavior shows before, after and under the controls.

    ids      changes to remove
    tokens   length of the answers in which behaviors are counted

    The counts are kept on disk, so that a second call does not repeat them.
    """
    bill = run.bill(ids)

    def make() -> list[Measure]:
        edit, controls = run.edit(ids)
        sides = {"before": run.pair.tuned, "after": edit.applied(run.pair.tuned)}
        sides |= {c.name: c.applied(run.pair.tuned) for c in controls if c.name.endswith(" 0")}
        measures = []
        shows: dict[str, dict[str, list[float]]] = {b.name: {} for b in behaviors}
        prompts = [p for b in behaviors for p in b.prompts[:PROMPTS]]
        with run.pair.running():
            answers = {side: complete(model, prompts, tokens) for side, model in sides.items()}
        for side, said in answers.items():
            for i, b in enumerate(behaviors):
                shows[b.name][side] = [float(b.shows(a)) for a in said[i * PROMPTS : (i + 1) * PROMPTS]]
        for b in behaviors:
            before, after = (proportion(int(sum(shows[b.name][s])), len(shows[b.name][s])) for s in ("before", "after"))
            control = {s[:-2]: sum(v) / len(v) for s, v in shows[b.name].items() if s.endswith(" 0")}
            measures.append(
                Measure(
                    f"answers that show {b.name} ({'wanted' if b.wanted else 'unwanted'})",
                    after.value,
                    after.low,
                    after.high,
                    "share",
                    control.get(RANDOM),
                    f"{before.value:.0%} before; "
                    + (f"{ELSEWHERE}: {control[ELSEWHERE]:.0%}; " if ELSEWHERE in control else "")
                    + f"{RANDOM} of equal energy",
                )
            )
        return measures

    place = run.keeper.at(
        "counted", run.harvest.fingerprint, run.found_key, run.plan.rank, run.plan.edit, ids, tokens, run.plan.seed
    )
    extra = run.keeper.kept_json(
        place, list[Measure], "measures.json", lambda _: make(), lambda _: "behaviors counted on held-out prompts"
    )
    return dataclasses.replace(bill, measures=[*extra, *bill.measures])


def complete(model: LanguageModel, prompts: Sequence[str | Chat], tokens: int) -> list[str]:
    """Greedy answers, at most `tokens` long, to user turns or conversations under the tokenizer's chat template."""
    chats = [chat(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    documents = tuple(
        Document(f"p{i}", "chat", messages=tuple((turn["role"], turn["content"]) for turn in turns))
        for i, turns in enumerate(chats)
    )
    rows = Corpus("prompts", documents).tokens(model.tokenizer, row_tokens=512).rows
    return [model.tokenizer.decode(a) for a in completing.complete(model, list(rows), tokens, batch=40)]
