"""Profiles: one quantity over subjects and places, each value with its interval and control."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from tunediff.core.artifacts import read_json, write_json
from tunediff.core.errors import ArtifactError, NumericsError, SettingError
from tunediff.core.text import number, one_line
from tunediff.core.typed import typed
from tunediff.records.measure import Measure

SCHEMA = "tunediff.profile/1"

SHOWN = 12
"""Number of places that a notebook shows of a profile."""


@dataclass(frozen=True, repr=False)
class Profile:
    """A number over subjects x places, such as the difference of two models at each layer.

    name       what the number is
    subjects   labels of the rows: models, checkpoints, seeds, changes, columns of a training curve
    places     labels of the columns, in order: sites, heads, latents, tensors, steps
    kind       what one place is, such as ``site`` or ``step``
    values     the number for each subject and place; NaN where it was not measured
    unit       the unit of all numbers here; empty for a plain ratio
    source     what computed it
    low, high  ends of the confidence interval, or None where there is none
    control    the same number for the control named in ``against``, or None where there is none

    Raises `NumericsError` unless every table is subjects x places, labels are unique and low comes with high.
    """

    name: str
    subjects: list[str]
    places: list[str]
    values: list[list[float]]
    unit: str = ""
    source: str = ""
    low: list[list[float]] | None = None
    high: list[list[float]] | None = None
    control: list[list[float]] | None = None
    against: str = ""
    kind: str = "site"

    def __post_init__(self) -> None:
        for which, labels in (("subjects", self.subjects), ("places", self.places)):
            if len(set(labels)) < len(labels):
                twice = next(label for label in labels if labels.count(label) > 1)
                raise NumericsError(
                    f"profile {self.name!r} names one of its {which} twice",
                    expected="unique labels",
                    got=repr(twice),
                    remedy="give each a label of its own",
                )
        if (self.low is None) != (self.high is None):
            raise NumericsError(
                f"profile {self.name!r} has one end of its interval",
                expected="low and high, or neither",
                got="low alone" if self.high is None else "high alone",
                remedy="give both ends",
            )
        for which, table in self._tables().items():
            if len(table) != len(self.subjects) or any(len(row) != len(self.places) for row in table):
                raise NumericsError(
                    f"{which} of profile {self.name!r} has the wrong shape",
                    expected=f"{len(self.subjects)} subjects x {len(self.places)} places",
                    got=f"rows of {sorted({len(row) for row in table})} numbers, {len(table)} of them",
                    remedy="give one row for each subject, one number for each place",
                )

    @classmethod
    def of_rows(cls, name: str, rows: Sequence[Mapping[str, float | None]], place: str, source: str) -> Profile:
        """A profile from the rows of a table: column `place` labels the places, the other columns are the subjects.

        Without that column, rows are numbered from 0. What a row lacks is NaN.
        """
        subjects = [column for column in (rows[0] if rows else ()) if column != place]
        labels = [_label(row.get(place, number)) for number, row in enumerate(rows)]
        values = [[_float(row.get(subject)) for row in rows] for subject in subjects]
        return cls(name, subjects, labels, values, source=source, kind=place)

    def _tables(self) -> dict[str, list[list[float]]]:
        tables = {"values": self.values, "low": self.low, "high": self.high, "control": self.control}
        return {which: table for which, table in tables.items() if table is not None}

    def only(self, subjects: Sequence[str] | None = None, places: Sequence[str] | None = None) -> Profile:
        """The part at some subjects and places, in the order given; all of them where None.

        Raises `SettingError` for a label that the profile does not have.
        """
        rows = self._numbers("subject", self.subjects, subjects)
        columns = self._numbers("place", self.places, places)
        part = {
            which: [[table[row][column] for column in columns] for row in rows]
            for which, table in self._tables().items()
        }
        return replace(
            self,
            subjects=[self.subjects[row] for row in rows],
            places=[self.places[column] for column in columns],
            values=part["values"],
            low=part.get("low"),
            high=part.get("high"),
            control=part.get("control"),
        )

    def measure(self, subject: str, place: str) -> Measure:
        """One value as a `Measure`; raises `SettingError` for a label that the profile does not have."""
        cell = {which: table[0][0] for which, table in self.only([subject], [place])._tables().items()}
        low, high, control = (cell.get(which) for which in ("low", "high", "control"))
        name = f"{self.name}, {subject} at {place}"
        return Measure(name, cell["values"], low, high, self.unit, control, self.against)

    def _numbers(self, which: str, labels: list[str], wanted: Sequence[str] | None) -> list[int]:
        if wanted is None:
            return list(range(len(labels)))
        at = {label: position for position, label in enumerate(labels)}
        for label in wanted:
            if label not in at:
                raise SettingError(
                    f"profile {self.name!r} has no {which} {label!r}",
                    expected=", ".join(labels[:SHOWN]) + ", …" * (len(labels) > SHOWN),
                )
        return [at[label] for label in wanted]

    def save(self, path: Path) -> None:
        """Write as canonical JSON; numbers that are not finite become null."""
        write_json(path, {"schema": SCHEMA, **{f.name: getattr(self, f.name) for f in fields(self)}})

    @classmethod
    def load(cls, path: Path) -> Profile:
        """Read and check what `save` wrote; raises `ArtifactError` for anything else."""
        record = read_json(path)
        schema = record.pop("schema", None) if isinstance(record, dict) else type(record).__name__
        if schema != SCHEMA:
            raise ArtifactError(f"{path} is not a profile", expected=SCHEMA, got=str(schema))
        profile: Profile = typed(cls, record, str(path))
        return profile

    def __repr__(self) -> str:
        unit = f", {self.unit}" if self.unit else ""
        return f"Profile({self.name!r}: {len(self.subjects)} x {len(self.places)}, places are {self.kind}s{unit})"

    def _repr_html_(self) -> str:
        def cell(tag: str, text: str) -> str:
            return f"<{tag}>{html.escape(one_line(text))}</{tag}>"

        shown, rest = self.places[:SHOWN], len(self.places) - SHOWN
        head = cell("th", "") + "".join(cell("th", place) for place in shown)
        rows = [
            cell("th", subject) + "".join(cell("td", number(value)) for value in row[:SHOWN])
            for subject, row in zip(self.subjects, self.values, strict=True)
        ]
        title = self.name + (f" ({self.unit})" if self.unit else "") + (f", {rest} more places" if rest > 0 else "")
        body = "".join(f"<tr>{row}</tr>" for row in (head, *rows))
        return f"<table>{cell('caption', title)}{body}</table>"


def _float(value: float | None) -> float:
    return float("nan") if value is None else float(value)


def _label(value: float | None) -> str:
    """A number as the label of a place, whole ones without a point."""
    given = _float(value)
    return str(int(given)) if given.is_integer() else repr(given)
