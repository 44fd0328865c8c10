"""The finding of a `Diff` in sentences, for the page and the terminal alike."""

from __future__ import annotations

from tunediff.core.text import percent
from tunediff.records.diff import Diff


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
