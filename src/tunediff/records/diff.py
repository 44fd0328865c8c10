"""Results: `Diff`, the whole finding as one typed record that the CLI, a notebook and the report all read."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tunediff.core.artifacts import read_json, write_json
from tunediff.core.errors import ArtifactError
from tunediff.core.typed import typed
from tunediff.records.measure import GAP, Context, DosePoint, Measure, SignalTable, TokenWeight

SCHEMA = "tunediff.diff/1"


@dataclass(frozen=True)
class ChangeRecord:
    """One ranked change with everything said of it.

    decision    confirmed, refuted or undecided (`reason` says why in one sentence)
    score       the ranking statistic with interval and null
    measures    the battery: necessity, sufficiency, specificity, latent scaling ... each with its control
    promoted, suppressed   tokens that the change makes more and less likely; ``read_by`` says how they were read
    depth       site -> share of the variance of the difference there (of the whole of it, for an offset) that the change's
                strength predicts, along a direction estimated on other documents
    kinds       text kind -> share of its tokens on which the change is on
    """

    rank: int
    id: str
    finder: str
    sites: list[str]
    share: float
    decision: str
    reason: str
    score: Measure
    measures: list[Measure]
    promoted: list[TokenWeight]
    suppressed: list[TokenWeight]
    read_by: str
    contexts: list[Context]
    depth: dict[str, float]
    kinds: dict[str, float]
    dose: list[DosePoint]
    origin: dict[str, Any] = field(default_factory=dict)

    @property
    def gap(self) -> float:
        """How far apart the models are where the change is on, nat a token; 0 if it was not on trial."""
        return next((m.value for m in self.measures if m.name == GAP and m.value is not None), 0.0)


@dataclass(frozen=True)
class ModelCard:
    """Which model: the name the user gave, a fingerprint of its weights, its size."""

    name: str
    fingerprint: str
    kind: str
    parameters: int
    layers: int
    width: int
    vocabulary: int


@dataclass(frozen=True)
class CorpusCard:
    """Which text: its fingerprint, how much, and tokens by kind."""

    fingerprint: str
    documents: int
    tokens: int
    held_out_documents: int
    held_out_tokens: int
    kinds: dict[str, int]


@dataclass(frozen=True)
class SiteScan:
    """The difference at one site: |delta| / |base| (rms), the part of its energy that is one constant offset, the
    noise floor on the same scale, and the share of KL(tuned || base) that the whole difference there makes in base."""

    site: str
    relative: float
    offset_share: float
    noise: float
    chosen: bool
    ceiling: float = float("nan")


@dataclass(frozen=True)
class FitCard:
    """A fitted dictionary: its settings, the training curve (rows of ``columns``), and held-out quality."""

    name: str
    settings: dict[str, Any]
    columns: list[str]
    curve: list[list[float]]
    measures: list[Measure]


@dataclass(frozen=True)
class NullCard:
    """A null: what it is, how many draws, and the ranking statistic of each draw's best change."""

    name: str
    note: str
    statistics: list[float]


@dataclass(frozen=True)
class Bill:
    """What an edit does and costs: which changes it removes, by which operation, and its measures."""

    name: str
    operation: str
    changes: list[str]
    measures: list[Measure]


@dataclass(frozen=True)
class StageCard:
    """One stage of the run: seconds (of the run that made it), whether it was skipped as already done, and notes."""

    name: str
    key: str
    seconds: float
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Diff:
    """The whole finding. ``found`` is whether any change was confirmed; ``summary`` says it in plain sentences;
    ``rate`` is the false-positive rate at which claims are made."""

    base: ModelCard
    tuned: ModelCard
    corpus: CorpusCard
    found: bool
    rate: float
    summary: list[str]
    output: list[Measure]
    scan: list[SiteScan]
    changes: list[ChangeRecord]
    signals: list[SignalTable]
    fits: list[FitCard]
    nulls: list[NullCard]
    bills: list[Bill]
    not_found: list[str]
    stages: list[StageCard]
    plan: dict[str, Any]
    version: str
    schema: str = SCHEMA

    @property
    def confirmed(self) -> list[ChangeRecord]:
        """The changes whose decision is ``confirmed``, in rank order."""
        return [change for change in self.changes if change.decision == "confirmed"]

    def save(self, path: Path) -> None:
        """Write as canonical JSON; non-finite numbers become null."""
        write_json(path, self)

    @classmethod
    def load(cls, path: Path) -> Diff:
        """Read and check a saved record; refuses another schema, unknown or missing fields, wrong types."""
        record = read_json(path)
        if not isinstance(record, dict) or record.get("schema") != SCHEMA:
            got = record.get("schema") if isinstance(record, dict) else type(record).__name__
            raise ArtifactError(f"{path} is not a diff record", expected=SCHEMA, got=str(got))
        return typed(cls, record, str(path))
