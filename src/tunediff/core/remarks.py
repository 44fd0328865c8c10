"""Remarks: what was left out, changed or decided on the way, counted by sort, with the place of the first."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Remark:
    """One sort of thing that was left out, changed or decided: how often, and where first."""

    what: str
    """What happened, in words that a count can follow: ``empty rows left out``."""
    count: int = 1
    """How often."""
    first: str = ""
    """Where it happened first, or an example; empty where there is none."""

    def __str__(self) -> str:
        return f"{self.what}: {self.count:,}" + (f" (first: {self.first})" if self.first else "")


class Remarks:
    """Counts of remarks by what they say, in the order in which they first came."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._first: dict[str, str] = {}

    def add(self, what: str, first: str = "", count: int = 1) -> None:
        """Count `what` once more, or `count` times; the place is kept if it is the first."""
        self._counts[what] = self._counts.get(what, 0) + count
        self._first.setdefault(what, first)

    def all(self) -> tuple[Remark, ...]:
        """Every sort of remark with its count and its first place."""
        return tuple(Remark(what, count, self._first[what]) for what, count in self._counts.items())
