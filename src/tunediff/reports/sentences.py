"""The finding of a `Diff` in sentences, for the page and the terminal alike."""

from __future__ import annotations

from tunediff.core.text import finite, percent
from tunediff.records.diff import Diff, TemplateCard
from tunediff.records.relation import KINDS, Relation


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
