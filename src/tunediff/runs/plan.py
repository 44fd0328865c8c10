"""Plans: a whole run composed of its parts' settings, read from and written to TOML, changed by ``part.field=value``."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tunediff import dictionaries
from tunediff.core import variants
from tunediff.harvests.contrasts import ContrastSettings
from tunediff.dictionaries.architectures.base import Spec
from tunediff.edits.reverting import EditSettings
from tunediff.core.errors import SettingError, within
from tunediff.core.typed import SETTING, read_toml, record, to_toml, typed, unknown
from tunediff.dictionaries.schedule import FitSettings
from tunediff.harvests.harvest import HarvestSettings
from tunediff.changes.rankings import RankSettings
from tunediff.harvests.scans import ScanSettings
from tunediff.changes.trials.base import VerifySettings


@dataclass(frozen=True)
class PairSettings:
    """How the two models are loaded."""

    dtype: str = "float32"
    """Of both forwards. In bfloat16 the difference between two light tunes is up to 60 % rounding error."""
    allow_identical: bool = False
    """Accept a tuned model that changes nothing, as a sanity null."""


@dataclass(frozen=True)
class CorpusSettings:
    """Which text both models read."""

    paths: tuple[str, ...] = ()
    """Files or folders of text, code, JSON lines or Parquet; empty: the corpus that ships with tunediff."""
    prompts: tuple[str, ...] = ()
    """Files of open chats for contrastive text; empty: the 480 everyday prompts that ship with tunediff."""
    kind: str = ""
    """A label for documents that bring none of their own."""
    tokens: int = 5_000
    """Tokens of corpus text at most, besides contrastive text; more finds rarer changes, at proportional cost."""
    row_tokens: int = 96
    """Tokens a row at most; a longer document becomes several rows."""
    held_out_share: float = 0.4
    """Share of documents no finder sees (0..1): less widens every interval, more starves the finders."""
    split: int = 166
    """Seed of the split. The default is the one of the first 20,000 that holds out most evenly over the 40 topics of the
    first 160 shipped prompts (at least one of four each); with seed 0 some topics are held out not at all."""


@dataclass(frozen=True)
class FindSettings:
    """Who looks for changes."""

    finders: tuple[str, ...] = ("crosscode", "decision_clusters", "mean_difference")
    """Finders by name, or by import path (mylab.finders:Mine)."""
    signals: tuple[str, ...] = ("logit_mining", "kl_map")
    """Evidence tables by name or import path."""
    dictionary: str = "delta"
    """Which dictionary crosscode fits, by name or import path."""
    candidates: int = 32
    """Changes each finder may propose at most; more dilutes the claim rate, fewer may miss one."""


@dataclass(frozen=True)
class RuntimeSettings:
    """What may change speed but never meaning; not part of any key."""

    device: str = "cpu"
    """Torch device."""
    threads: int = 0
    """CPU threads; 0 leaves torch's choice."""

    def __post_init__(self) -> None:
        within("runtime", self, threads=0)


@dataclass(frozen=True)
class Plan:
    """A whole run. ``dictionary`` holds settings of the named dictionary's own spec, checked against it."""

    base: str = "default"
    """The model that was tuned: a folder, a hub id, a GGUF file, or default."""
    tuned: str = "demo"
    """The tuned model: any of these, a PEFT adapter folder, or demo."""
    seed: int = 0
    """Of every random stream: the split, sampling, fitting, nulls and controls."""
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

    def check(self) -> None:
        """Raise `VariantError` or `SettingError` if a named part does not exist or the dictionary has no such setting."""
        self.spec()
        for package, names in (("tunediff.changes.finders", self.find.finders), ("tunediff.changes.signals", self.find.signals)):
            for name in names:
                variants.load(package, name)

    def set(self, text: str) -> "Plan":
        """This plan with one ``part.field=value`` (or ``seed=3``) applied; the value as TOML, else as a string."""
        path, equals, value_text = text.partition("=")
        if not equals:
            raise SettingError(f"{text!r} sets nothing", expected="part.field=value", remedy="verify.draws=200")
        try:
            value = tomllib.loads(f"x = {value_text}")["x"]
        except tomllib.TOMLDecodeError:
            value = value_text
        record = to_record(self)
        *parents, last = path.strip().split(".")
        target = record
        for name in parents:
            if not isinstance(target.get(name), dict):
                raise unknown(name, target, path)
            target = target[name]
        if last not in target and parents != ["dictionary"]:
            raise unknown(last, target, path)
        target[last] = value
        return from_record(record)

    @classmethod
    def read(cls, path: Path) -> "Plan":
        """Read a TOML plan; what it leaves out keeps its default."""
        return from_record(read_toml(path))

    def to_toml(self) -> str:
        """The whole plan as TOML; `read` gives it back."""
        return to_toml(to_record(self))


def to_record(plan: Any) -> dict[str, Any]:
    """A plan as nested plain values."""
    return record(plan)


def from_record(values: dict[str, Any]) -> Plan:
    """A plan from nested plain values; unknown keys are errors that name the nearest known one."""
    return typed(Plan, values, "", SETTING)
