"""Plans: a whole run composed of its parts' settings, read from and written to TOML, changed by ``part.field=value``."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tunediff import dictionaries
from tunediff.changes.finders.base import Finder
from tunediff.changes.rankings import RankSettings
from tunediff.changes.signals.base import Signal
from tunediff.changes.trials.base import Trial, VerifySettings
from tunediff.core import variants
from tunediff.core.errors import SettingError, within
from tunediff.core.typed import REST, SETTING, read_toml, record, to_toml, typed, unknown
from tunediff.dictionaries.architectures.base import Spec
from tunediff.dictionaries.schedule import FitSettings
from tunediff.edits.edit import EditSettings
from tunediff.harvests.contrasts import ContrastSettings
from tunediff.harvests.harvest import HarvestSettings
from tunediff.harvests.scans import ScanSettings
from tunediff.models.families.base import Family


@dataclass(frozen=True)
class PairSettings:
    """How the two models are loaded."""

    dtype: str = "float32"
    """Precision of both models' forward passes; in bfloat16, up to 60 % of the difference between two light fine-tunes is rounding error."""
    family: str = ""
    """Who reads both networks, by name or import path; empty: the family that their structure tells."""
    allow_identical: bool = False
    """Accept a tuned model identical to base, as a sanity check."""


@dataclass(frozen=True)
class CorpusSettings:
    """Text that both models read."""

    paths: tuple[str, ...] = ()
    """Files or folders of text, code, JSON lines or Parquet; empty: the corpus that ships with tunediff."""
    prompts: tuple[str, ...] = ()
    """Files of open chats for contrastive text; empty: the 480 everyday prompts that ship with tunediff."""
    kind: str = ""
    """Label of documents that have none of their own."""
    tokens: int = 5_000
    """Largest number of corpus tokens, besides contrastive text; more finds rarer changes, at proportional cost."""
    row_tokens: int = 96
    """Largest number of tokens in a row; a longer document becomes several rows."""
    held_out_share: float = 0.4
    """Share of documents held out from finders (0..1); less widens intervals, more leaves finders too little text."""
    split: int = 166
    """Seed of the split. The default is the one of the first 20,000 that holds out most evenly over the 40 topics of the
    first 160 shipped prompts (at least one of four each); with seed 0 some topics are held out not at all."""


@dataclass(frozen=True)
class FindSettings:
    """Which finders and signals run, on which settings."""

    finders: tuple[str, ...] = ("crosscode", "decision_clusters", "mean_difference")
    """Finders by name, or by import path (mylab.finders:Mine)."""
    signals: tuple[str, ...] = ("logit_mining", "kl_map")
    """Evidence tables by name or import path."""
    dictionary: str = "delta"
    """Dictionary that the finder `crosscode` fits, by name or import path."""
    candidates: int = 32
    """Largest number of changes that each finder may propose; more lower the test's power, fewer may miss a change."""
    settings: dict[str, dict[str, Any]] = field(default_factory=dict, metadata=REST)
    """Settings of finders and signals: one table for each, by its name."""


@dataclass(frozen=True)
class RuntimeSettings:
    """Settings that change speed, never results' meaning; they are part of no content key."""

    device: str = "cpu"
    """Torch device."""
    threads: int = 0
    """CPU threads; 0 leaves torch's choice."""
    fast: bool = True
    """Accelerate the networks' runs; without it every run is transformers' and PEFT's own."""

    def __post_init__(self) -> None:
        within("runtime", self, threads=0)


@dataclass(frozen=True)
class Plan:
    """A whole run. ``dictionary`` holds settings of the named dictionary's own spec, checked against it."""

    base: str = "default"
    """The base model that was fine-tuned: a folder, a hub id, a GGUF file, or default."""
    tuned: str = "demo"
    """The tuned model: any of these, a PEFT adapter folder, or demo."""
    seed: int = 0
    """Seed of every random stream: sampling, fitting, random fine-tunes and controls."""
    pair: PairSettings = PairSettings()
    corpus: CorpusSettings = CorpusSettings()
    contrast: ContrastSettings = ContrastSettings()
    scan: ScanSettings = ScanSettings()
    harvest: HarvestSettings = HarvestSettings()
    find: FindSettings = FindSettings()
    dictionary: dict[str, Any] = field(default_factory=dict)
    fit: FitSettings = FitSettings()
    rank: RankSettings = RankSettings()
    verify: VerifySettings = VerifySettings()
    edit: EditSettings = EditSettings()
    runtime: RuntimeSettings = RuntimeSettings()

    def spec(self) -> Spec:
        """The dictionary's spec with this plan's settings."""
        return dictionaries.spec(self.find.dictionary, **self.dictionary)

    def finders(self) -> dict[str, Finder]:
        """The chosen finders with their settings, by name."""
        return {name: variants.make(Finder, name, self.find.settings.get(name), "find") for name in self.find.finders}

    def signals(self) -> dict[str, Signal]:
        """The chosen signals with their settings, by name."""
        return {name: variants.make(Signal, name, self.find.settings.get(name), "find") for name in self.find.signals}

    def trials(self) -> dict[str, Trial]:
        """The chosen trials with their settings, by name."""
        settings = self.verify.settings
        return {name: variants.make(Trial, name, settings.get(name), "verify") for name in self.verify.trials}

    def family(self) -> Family | None:
        """The family that the plan names; None where the networks' structure tells it."""
        return variants.make(Family, self.pair.family) if self.pair.family else None

    def check(self) -> None:
        """Raise `VariantError` or `SettingError` if a named part does not exist, or a setting names no chosen part."""
        self.spec()
        self.family()
        for part, table, chosen in (
            ("find", self.find.settings, {**self.finders(), **self.signals()}),
            ("verify", self.verify.settings, self.trials()),
        ):
            for name in set(table) - set(chosen):
                what = f"{part}.{name} holds settings, but no part of that name is chosen"
                near = difflib.get_close_matches(name, chosen, n=1)
                raise SettingError(what, expected=", ".join(chosen), remedy=near[0] if near else "")

    def imports(self) -> list[str]:
        """The import paths that this plan names: carrying it out runs code that does not ship with tunediff."""
        named = (self.pair.family, *self.find.finders, *self.find.signals, self.find.dictionary, *self.verify.trials)
        return sorted({name for name in named if variants.is_import_path(name)})

    def refuse_imports(self, typed: Iterable[str] = ()) -> None:
        """Raise `SettingError` for an import path that none of the texts that the user `typed` holds."""
        texts = list(typed)
        foreign = [name for name in self.imports() if not any(name in text for text in texts)]
        if foreign:
            raise SettingError(
                f"the plan names code of its own: {', '.join(foreign)}",
                expected="parts that ship with tunediff, or import paths given on the command line",
                remedy="--allow-code, if you trust whoever wrote the plan",
            )

    def set(self, text: str) -> Plan:
        """This plan with one ``part.field=value`` applied: ``seed=3``, ``verify.draws=200``, or a setting of a variant,
        ``find.decision_clusters.alike=0.3``. The value is TOML, else a string."""
        path, equals, value_text = text.partition("=")
        if not equals:
            raise SettingError(f"{text!r} sets nothing", expected="part.field=value", remedy="verify.draws=200")
        try:
            value = tomllib.loads(f"x = {value_text}")["x"]
        except tomllib.TOMLDecodeError:
            value = value_text
        values = to_record(self)
        *parents, last = _steps(path.strip())
        target = values
        for depth, name in enumerate(parents):
            if depth == 1 and name not in target and parents[0] in ("find", "verify"):
                target[name] = {}
            if not isinstance(target.get(name), dict):
                raise unknown(name, target, path)
            target = target[name]
        if last not in target and len(parents) < 2 and parents != ["dictionary"]:
            raise unknown(last, target, path)
        target[last] = value
        return from_record(values)

    @classmethod
    def read(cls, path: Path) -> Plan:
        """Read a TOML plan; what it leaves out keeps its default."""
        return from_record(read_toml(path))

    def to_toml(self) -> str:
        """The whole plan as TOML; `read` gives it back."""
        return to_toml(to_record(self))


def to_record(plan: Any) -> dict[str, Any]:
    """A plan as nested plain values."""
    values: dict[str, Any] = record(plan)
    return values


def from_record(values: dict[str, Any]) -> Plan:
    """A plan from nested plain values; unknown keys are errors that name the nearest known one."""
    plan: Plan = typed(Plan, _without_retired(values), "", SETTING)
    return plan


RETIRED = {("fit", "precision"): "float32"}
"""Settings of earlier versions, with the one value that still means what happens now."""


def _without_retired(values: dict[str, Any]) -> dict[str, Any]:
    kept = {part: dict(fields) if isinstance(fields, dict) else fields for part, fields in values.items()}
    for (part, name), value in RETIRED.items():
        given = kept[part].pop(name, value) if isinstance(kept.get(part), dict) else value
        if given != value:
            raise SettingError(f"{part}.{name} is no setting any more", expected=str(value), got=str(given))
    return kept


def _steps(path: str) -> list[str]:
    """The names along a dotted path; a variant's import path, quoted or not, is one name."""
    if ":" not in path:
        return path.split(".")
    part, _, rest = path.partition(".")
    name, _, last = rest.rpartition(".")
    return [part, name.strip("\"'"), last]
