"""The finding of a `Diff` in sentences, for the page and the terminal alike."""

from __future__ import annotations

from collections.abc import Mapping

from tunediff.core.text import finite, number, percent
from tunediff.records.diff import Diff, TemplateCard
from tunediff.records.elicited import Answered, Condition
from tunediff.records.finding import Finding, When
from tunediff.records.relation import KINDS, Relation

TITLE = 5
"""Largest number of words in a finding's title."""


def verdict(diff: Diff) -> str:
    """The finding in one sentence, e.g. ``2 confirmed changes``."""
    count = len(diff.confirmed)
    if count:
        return f"{count} confirmed change{'s' * (count > 1)}"
    if diff.refusal:
        return "No change could be confirmed: random tunes leave out too much of the difference"
    return f"No change found at a false-positive rate of {percent(diff.rate)}"


def tally(diff: Diff) -> str:
    """How many changes were ranked and what became of them, e.g. ``5 ranked: 2 confirmed, 3 refuted``."""
    if not diff.changes:
        return "No change was ranked"
    counts = {d: sum(c.decision == d for c in diff.changes) for d in ("confirmed", "refuted", "undecided")}
    counts["other"] = len(diff.changes) - sum(counts.values())
    kept = [f"{n} {d}" for d, n in counts.items() if n]
    return f"{len(diff.changes)} ranked: {', '.join(kept)}"


def title(finding: Finding) -> str:
    """What a finding is, in a few words of tuned's own."""
    words = ", ".join(finding.words[:TITLE]) or "(no word tells it)"
    return f"says less: {words}" if finding.less else f"says {words}"


def asked_for(finding: Finding, conditions: Mapping[str, Condition]) -> str:
    """On which questions a finding shows; empty where none was found for it."""
    first = _widest(finding, conditions)
    more = len(finding.when) - 1
    return "" if first is None else f"asked {first.asked!r}" + (f" and {more} more" if more else "")


def apart(finding: Finding, conditions: Mapping[str, Condition]) -> str:
    """How far apart the models are where a finding shows the most; empty where no question was found for it."""
    first = _widest(finding, conditions)
    if first is None:
        return ""
    return f"{number(first.divergence.value)} nat a token apart there, {number(first.divergence.control)} on everyday questions"


def example(finding: Finding, conditions: Mapping[str, Condition]) -> Answered | None:
    """One question on which a finding shows, with both answers."""
    answers = [a for when in finding.when if when.asked in conditions for a in conditions[when.asked].answers]
    return next((answer for answer in answers if answer.tuned), None)


def _widest(finding: Finding, conditions: Mapping[str, Condition]) -> Condition | None:
    return next((conditions[when.asked] for when in finding.when if when.asked in conditions), None)


def shown_by(finding: Finding) -> str:
    """Which confirmed changes a finding has."""
    members = finding.members
    if not members:
        return "no confirmed change carries it"
    return f"{len(members)} confirmed change{'s' * (len(members) > 1)}: {', '.join(members)}"


def carrying(when: When) -> str:
    """How much of the divergence of a sort of questions one change carries."""
    share = when.share
    if share.value is None:
        return "no change was taken out to see what carries it"
    told = f"{percent(share.value)} of it (random directions at most {percent(share.control or 0.0)})"
    return f"without {when.carrier} {told} is gone" if when.carrier else f"no confirmed change carries more than {told}"


def related(relation: Relation) -> list[str]:
    """How tuned relates to base: what its weights look like, what of the configuration differs, and what else was noticed."""
    told = [f"{KINDS.get(relation.kind, relation.kind)}: {_numbers(relation)}"]
    if relation.config:
        first = "; ".join(f"{d.field} {d.base} in base, {d.tuned} in tuned" for d in relation.config[:3])
        rest = len(relation.config) - 3
        told.append(f"their configurations differ: {first}" + (f"; and {rest} more fields" if rest > 0 else ""))
    return told + relation.notes


def _numbers(relation: Relation) -> str:
    said = []
    if relation.kind != "same weights":
        said.append(f"weights are {percent(relation.distance)} of base's norm away")
    said.append(f"{percent(relation.equal)} of numbers are equal")
    if relation.is_foreign and finite(relation.cosine):
        said.append(f"the median cosine of matrices is {relation.cosine:.2f}")
    if relation.rank is not None and relation.changed:
        said.append(f"{relation.changed} matrices differ, by ranks of at most {relation.rank}")
    return ", ".join(said)


def form(template: TemplateCard) -> str:
    """How chats were read and asked: whose chat template, what it was told, and whose tokenizer encoded it."""
    plain = template.origin == "plain"
    said = "plain lines" if plain else f"the chat template of {template.origin} ({template.fingerprint})"
    if template.options:
        said += ", with " + ", ".join(f"{name} = {value}" for name, value in sorted(template.options.items()))
    if template.date:
        said += f", told that today is {template.date}"
    return said + (", in tuned’s tokenizer" if template.tokenizer == "tuned" else "")
