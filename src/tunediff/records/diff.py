"""Results: `Diff`, the whole finding as one typed record that the command line, notebooks and the report all read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tunediff.core.artifacts import read_json, sealed, write_json
from tunediff.core.errors import ArtifactError, NumericsError
from tunediff.core.remarks import Remark
from tunediff.core.typed import typed
from tunediff.records import older
from tunediff.records.elicited import Condition
from tunediff.records.finding import Finding
from tunediff.records.measure import GAP, STANDING, Context, DosePoint, Measure, SignalTable, TokenWeight
from tunediff.records.profile import Profile
from tunediff.records.relation import Relation
from tunediff.records.scan import Scan

SCHEMA = "tunediff.diff/2"
OLDER = "tunediff.diff/1"
"""Schema of records whose scan, depth and training curves were tables of their own; still read."""
OUTPUT = "output"
"""In place of sites, for changes at the output: they claim tokens, and no direction in a stream."""


@dataclass(frozen=True)
class ChangeRecord:
    """One ranked change with everything that was found out about it.

    sites       where it is read and written; `OUTPUT` alone for a change that claims tokens
    share       `Change.share`: 0 base only, 1/2 both, 1 tuned only; at the output, the part of its tokens' probability
                that is tuned's
    decision    confirmed, refuted or undecided; `reason` says why in one sentence
    score       the ranking statistic with its interval and null
    measures    results of the trials (necessity, sufficiency, ...) and of Latent Scaling, each with its control
    promoted, suppressed   tokens that the change makes more and less likely; ``read_by`` says how they were read
    depth       share of the difference that goes along with the change at each scanned site (`depth_profile`)
    kinds       for each kind of text, the share of its tokens on which the change is on
    dose        the dose-response curve, empty where the change was not on trial
    origin      `Change.origin`
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
    depth: Profile | None
    kinds: dict[str, float]
    dose: list[DosePoint]
    origin: dict[str, Any] = field(default_factory=dict)

    @property
    def is_at_output(self) -> bool:
        """Whether it claims tokens, and no direction in a stream."""
        return self.sites == [OUTPUT]

    @property
    def gap(self) -> float:
        """KL(tuned || base) where the change is on, nat a token; 0 if the change was not on trial."""
        return self._measured(GAP)

    @property
    def standing(self) -> float:
        """How much its tokens' logits are raised over all text, nat; 0 for a change that does not claim raised tokens."""
        return self._measured(STANDING)

    def _measured(self, name: str) -> float:
        return next((m.value for m in self.measures if m.name == name and m.value is not None), 0.0)


@dataclass(frozen=True)
class ModelCard:
    """Which model: the name that the user gave, a fingerprint of the weights, and the size."""

    name: str
    fingerprint: str
    kind: str
    parameters: int
    layers: int
    width: int
    vocabulary: int


@dataclass(frozen=True)
class CorpusCard:
    """Which text: its fingerprint, its size, and tokens of each kind.

    remarks, prompt_remarks   what was left out or changed where the files of text and of prompts were read
    """

    fingerprint: str
    documents: int
    tokens: int
    held_out_documents: int
    held_out_tokens: int
    kinds: dict[str, int]
    remarks: list[Remark] = field(default_factory=list)
    prompt_remarks: list[Remark] = field(default_factory=list)


@dataclass(frozen=True)
class WeightsCard:
    """One kind of parameters in which base and tuned differ.

    kind         what they are, such as ``linear maps``, ``experts`` or ``embeddings``
    parameters   how many of them differ
    share        their share of the difference (0..1): squared changes, each relative to its own parameter, summed
    covered      whether random tunes change them too, each in its own norm
    """

    kind: str
    parameters: int
    share: float
    covered: bool


@dataclass(frozen=True)
class TemplateCard:
    """Which form chats have: whose chat template, its fingerprint, what it was given, and whose tokenizer encodes text."""

    origin: str
    fingerprint: str
    date: str
    """The day that the template is told as today's; empty where it does not ask."""
    options: dict[str, Any]
    tokenizer: str


@dataclass(frozen=True)
class FitCard:
    """A fitted dictionary: settings, training curve (a profile of each column over steps) and held-out quality."""

    name: str
    settings: dict[str, Any]
    curve: Profile | None
    measures: list[Measure]


@dataclass(frozen=True)
class NullCard:
    """A null: what it is, and the ranking statistic of the best change in each draw."""

    name: str
    note: str
    statistics: list[float]


@dataclass(frozen=True)
class Bill:
    """What an edit does and costs: the changes it removes, the operation, and its measures on held-out text.

    failed   why there are no measures, where the bill could not be made; empty otherwise
    """

    name: str
    operation: str
    changes: list[str]
    measures: list[Measure]
    failed: str = ""


@dataclass(frozen=True)
class StageCard:
    """One stage of a run: its key, the seconds it took when its result was made, and notes."""

    name: str
    key: str
    seconds: float
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Diff:
    """The whole finding of one run on one pair.

    found       whether any change was confirmed
    rate        false-positive rate at which changes are claimed
    summary     the finding in plain sentences
    output      KL(tuned || base) on each sort of held-out text
    not_found   what was looked at without a finding, and what could not be seen
    plan        the settings of the run, as nested plain values
    weights     the kinds of parameters that differ, largest share first; empty in older records
    refusal     why no change may be confirmed whatever it scores; empty where nothing stands against it
    relation    how tuned's weights and configuration relate to base's; None in records of earlier versions
    template    the form of chats; None in records that were made before it was told
    elicited    sorts of questions on which the models differ far more than on everyday ones, as a search found them
    findings    what was found, each told once, however many changes and sorts of questions show it
    """

    base: ModelCard
    tuned: ModelCard
    corpus: CorpusCard
    found: bool
    rate: float
    summary: list[str]
    output: list[Measure]
    scan: Scan | None
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
    weights: list[WeightsCard] = field(default_factory=list)
    refusal: str = ""
    relation: Relation | None = None
    template: TemplateCard | None = None
    elicited: list[Condition] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    @property
    def confirmed(self) -> list[ChangeRecord]:
        """The changes whose decision is ``confirmed``, in rank order."""
        return [change for change in self.changes if change.decision == "confirmed"]

    def save(self, path: Path) -> None:
        """Write as canonical JSON with a checksum; non-finite numbers become null."""
        write_json(path, sealed(self))

    @classmethod
    def load(cls, path: Path) -> Diff:
        """Read and check a saved record, of this schema or of ``tunediff.diff/1``.

        Raises `ArtifactError` for another schema, unknown or missing fields and wrong types.
        """
        record = read_json(path)
        schema = record.get("schema") if isinstance(record, dict) else type(record).__name__
        if schema == OLDER:
            record = _renewed(older.diff, record, str(path))
        elif schema != SCHEMA:
            raise ArtifactError(f"{path} is not a diff record", expected=SCHEMA, got=str(schema))
        diff: Diff = typed(cls, record, str(path))
        return diff


def load_scan(path: Path) -> Scan:
    """Read a scan, of this or an older form; raises `ArtifactError` for anything else."""
    scan: Scan = typed(Scan, _renewed(older.scan, read_json(path), path.name), path.name)
    return scan


def load_depth(value: Any, subject: str) -> Profile | None:
    """Read a change's depth, of this or an older form, from plain JSON; raises `ArtifactError` for anything else."""
    depth: Profile | None = typed(Profile | None, _renewed(lambda v: older.depth(v, subject), value, "depth"), "depth")
    return depth


def load_records(path: Path) -> list[ChangeRecord]:
    """Read ranked changes, of this or an older form; raises `ArtifactError` for anything else."""
    renewed = _renewed(lambda records: [older.change(record) for record in records], read_json(path), path.name)
    records: list[ChangeRecord] = typed(list[ChangeRecord], renewed, path.name)
    return records


def _renewed(renew: Callable[[Any], Any], value: Any, where: str) -> Any:
    """What `renew` makes of an older record; raises `ArtifactError` for one that is damaged."""
    try:
        return renew(value)
    except (KeyError, TypeError, AttributeError, NumericsError) as error:
        raise ArtifactError(
            f"{where} is damaged", got=f"{type(error).__name__}: {error}", remedy="delete it and run again"
        ) from None
