"""Plans: a whole run composed of its parts' settings, read from and written to TOML, changed by ``part.field=value``."""

from __future__ import annotations

import ast
import dataclasses
import glob
import shlex
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from tunediff import dictionaries
from tunediff.changes.finders.base import Finder
from tunediff.changes.rankings import RankSettings
from tunediff.changes.signals.base import Signal
from tunediff.changes.trials.base import Trial, VerifySettings
from tunediff.core import variants
from tunediff.core.errors import SettingError, within
from tunediff.core.text import nearest
from tunediff.core.typed import LARGEST, NONE, REST, SETTING, read_toml, record, to_toml, typed, unknown
from tunediff.dictionaries.architectures.base import Spec
from tunediff.dictionaries.schedule import FitSettings
from tunediff.edits.edit import EditSettings
from tunediff.harvests.contrasts import ContrastSettings
from tunediff.harvests.eliciting import ElicitSettings
from tunediff.harvests.elicitors.base import Elicitor
from tunediff.harvests.harvest import HarvestSettings
from tunediff.harvests.scans import ScanSettings
from tunediff.models.families.base import Family
from tunediff.models.loading import check_runtime
from tunediff.texts.chat_template import DATE, NAMED, SECONDS, check_options, template_file
from tunediff.texts.reading import ReadSettings

T = TypeVar("T")
DTYPES = ("float32", "bfloat16", "float16", "float64")
"""Precisions of a forward pass."""


def place(*words: str) -> dict[str, tuple[str, ...]]:
    """Metadata of a field that names files or folders, or is one of `words`; a plan that is carried out holds them as
    every folder sees them."""
    return {"place": words}


@dataclass(frozen=True)
class PairSettings:
    """How the two models are loaded."""

    dtype: str = "float32"
    """Precision of both models' forward passes; in bfloat16, up to 60 % of the difference between two light fine-tunes is rounding error."""
    family: str = ""
    """Who reads both networks, by name or import path; empty: the family that their structure tells."""
    allow_identical: bool = False
    """Accept a tuned model identical to base, as a sanity check."""
    shared_text: float = 0.5
    """Smallest share of the text (0..1) that both tokenizers must cut into the same tokens, where they differ. Documents
    that they cut differently are left out; below this share the pair is refused."""
    over: str = field(default="", metadata=place("", "default"))
    """The model that adapters are over, where BASE is an adapter too, or TUNED's is not over BASE; empty: the one that BASE's configuration names."""
    allow_unrelated: bool = False
    """Accept a tuned model whose weights do not come from base's; what is found is then any difference of two models."""

    template: str = field(default="auto", metadata=place(*NAMED))
    """Form of chats, for both models: base's or tuned's chat template (base, tuned), plain lines (plain), or a file that
    holds a Jinja template. auto is tuned's where it brings one, else base's, else plain lines."""
    template_options: dict[str, Any] = field(default_factory=dict)
    """Variables that a chat template is given, such as {enable_thinking=false}."""
    template_seconds: float = SECONDS
    """Longest time in seconds that a chat template may take for one chat."""
    date: str = DATE
    """Day that a chat template is told as today's, YYYY-MM-DD, so that a run is the same tomorrow. The default is the one
    that Llama 3's templates fall back to."""

    def __post_init__(self) -> None:
        within("pair", self, shared_text=(0, 1), template_seconds=(0.01, 3600))
        check_options(self.template_options, self.date)
        if self.dtype not in DTYPES:
            raise SettingError(
                f"pair.dtype is {self.dtype!r}",
                expected=", ".join(DTYPES),
                remedy=f"--set pair.dtype={nearest(self.dtype, DTYPES, cutoff=0.0)}",
            )


@dataclass(frozen=True)
class CorpusSettings(ReadSettings):
    """Text that both models read."""

    paths: tuple[str, ...] = field(default=(), metadata=place())
    """Files, folders or patterns (``data/*.jsonl``) of text, code, JSON, CSV, Parquet or Arrow, also compressed, and data
    sets of the hub (``owner/name:SPLIT``); empty: the corpus that ships with tunediff."""
    prompts: tuple[str, ...] = field(default=(), metadata=place())
    """Prompts for contrastive text, in files of any of these forms or one a line of a text file; empty: the 480 everyday
    prompts that ship with tunediff."""
    tokens: int = 5_000
    """Largest number of corpus tokens, besides contrastive text; more finds rarer changes, at proportional cost."""
    row_tokens: int = 96
    """Largest number of tokens in a row; a longer document becomes several rows."""
    held_out_share: float = 0.4
    """Share of documents held out from finders (0..1); less widens intervals, more leaves finders too little text."""
    split: int = 166
    """Seed of the split. The default is the one of the first 20,000 that holds out most evenly over the 40 topics of the
    first 160 shipped prompts (at least one of four each); with seed 0 some topics are held out not at all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        within("corpus", self, tokens=1, row_tokens=2)
        if not 0 < self.held_out_share < 1:
            raise SettingError(
                "corpus.held_out_share is out of range", expected="above 0 and below 1", got=str(self.held_out_share)
            )


@dataclass(frozen=True)
class FindSettings:
    """Which finders and signals run, on which settings."""

    finders: tuple[str, ...] = ("crosscode", "decision_clusters", "mean_difference")
    """Finders by name, or by import path (mylab.finders:Mine)."""
    output_finders: tuple[str, ...] = ("logit_gains", "new_tokens", "token_shift")
    """Finders of changes that claim tokens, by name or import path: tokens whose logits tuned raises or lowers, tokens that
    only one model has, and tokens said more or less often where streams are equal."""
    signals: tuple[str, ...] = ("logit_mining", "kl_map")
    """Evidence tables by name or import path."""
    dictionary: str = "delta"
    """Dictionary that the finder `crosscode` fits, by name or import path."""
    candidates: int = 32
    """Largest number of changes that each finder may propose; more lower the test's power, fewer may miss a change."""
    settings: dict[str, dict[str, Any]] = field(default_factory=dict, metadata=REST)
    """Settings of finders and signals: one table for each, by its name."""

    def __post_init__(self) -> None:
        within("find", self, candidates=1)
        if not self.finders:
            raise SettingError("find.finders is empty", expected="at least one finder")


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
        within("runtime", self, threads=(0, 4096))


@dataclass(frozen=True)
class Plan:
    """A whole run. ``dictionary`` holds settings of the named dictionary's own spec, checked against it."""

    base: str = field(default="default", metadata=place("default", "demo"))
    """The base model that was fine-tuned: a folder, a hub id, a GGUF file, or default."""
    tuned: str = field(default="demo", metadata=place("default", "demo"))
    """The tuned model: any of these, a PEFT adapter folder, or demo."""
    seed: int = 0
    """Seed of every random stream: sampling, fitting, random fine-tunes and controls."""
    pair: PairSettings = PairSettings()
    corpus: CorpusSettings = CorpusSettings()
    contrast: ContrastSettings = ContrastSettings()
    elicit: ElicitSettings = ElicitSettings()
    scan: ScanSettings = ScanSettings()
    harvest: HarvestSettings = HarvestSettings()
    find: FindSettings = FindSettings()
    dictionary: dict[str, Any] = field(default_factory=dict)
    fit: FitSettings = FitSettings()
    rank: RankSettings = RankSettings()
    verify: VerifySettings = VerifySettings()
    edit: EditSettings = EditSettings()
    runtime: RuntimeSettings = RuntimeSettings()

    def __post_init__(self) -> None:
        within("", self, seed=(0, LARGEST))

    def spec(self) -> Spec:
        """The dictionary's spec with this plan's settings."""
        return dictionaries.spec(self.find.dictionary, "--set find.dictionary={}", **self.dictionary)

    def elicitors(self) -> dict[str, Elicitor]:
        """The chosen elicitors with their settings, by name."""
        return self._chosen(Elicitor, "elicit", "elicitors")

    def finders(self) -> dict[str, Finder]:
        """The chosen finders with their settings, by name."""
        return self._chosen(Finder, "find", "finders")

    def output_finders(self) -> dict[str, Finder]:
        """The chosen finders of changes that claim tokens, by name."""
        return self._chosen(Finder, "find", "output_finders")

    def signals(self) -> dict[str, Signal]:
        """The chosen signals with their settings, by name."""
        return self._chosen(Signal, "find", "signals")

    def trials(self) -> dict[str, Trial]:
        """The chosen trials with their settings, by name."""
        return self._chosen(Trial, "verify", "trials")

    def output_trials(self) -> dict[str, Trial]:
        """The chosen trials of changes that claim tokens, by name."""
        return self._chosen(Trial, "verify", "output_trials")

    def _chosen(self, base: type[T], part: str, kind: str) -> dict[str, T]:
        settings: Any = getattr(self, part)
        names: tuple[str, ...] = getattr(settings, kind)
        made = {}
        for name in names:
            others = [f'"{n}"' if n != name else '"{}"' for n in names]
            option = shlex.quote(f"{part}.{kind}=[{', '.join(others)}]") if len(names) > 1 else f"{part}.{kind}={{}}"
            made[name] = variants.make(base, name, settings.settings.get(name), part, f"--set {option}")
            at_output = getattr(made[name], "at_output", False)
            if at_output != kind.startswith("output_"):
                there = kind.removeprefix("output_") if not at_output else f"output_{kind}"
                raise SettingError(
                    f"{name} does not belong into {part}.{kind}",
                    expected=f"one of changes that claim {'directions' if at_output else 'tokens'}",
                    remedy=shlex.join(["--set", f'{part}.{there}=["{name}"]']),
                )
        return made

    def family(self) -> Family | None:
        """The family that the plan names; None where the networks' structure tells it."""
        name = self.pair.family
        return variants.make(Family, name, typed_as="--set pair.family={}") if name else None

    def check(self) -> None:
        """Raise an error for what can be told before a model is loaded: a named part that does not exist or does not
        fit, a setting of a part that is not chosen, a device that torch cannot use, text that no file can hold.
        """
        self.to_toml()
        check_runtime(self.pair.dtype, self.runtime.device)
        self.spec()
        self.family()
        if self.pair.template not in NAMED:
            template_file(self.pair.template)
        for part, table, chosen in (
            ("find", self.find.settings, {**self.finders(), **self.output_finders(), **self.signals()}),
            ("verify", self.verify.settings, {**self.trials(), **self.output_trials()}),
            ("elicit", self.elicit.settings, self.elicitors()),
        ):
            for name in sorted(set(table) - set(chosen)):
                what = f"{part}.{name} holds settings, but no part of that name is chosen"
                near = nearest(name, chosen)
                meant = f"{part}.{near} in place of {part}.{name}" if near else ""
                raise SettingError(what, expected=", ".join(chosen), remedy=meant)

    def imports(self) -> list[str]:
        """The import paths that this plan names: carrying it out runs code that does not ship with tunediff."""
        find, verify = self.find, self.verify
        named = (self.pair.family, *find.finders, *find.output_finders, *find.signals, find.dictionary)
        named = (*named, *verify.trials, *verify.output_trials, *self.elicit.elicitors)
        return sorted({name for name in named if variants.is_import_path(name)})

    def changed(self, settings: Sequence[str] | Mapping[str, Any]) -> Plan:
        """This plan with settings changed: texts as `set` takes them, or a table by part and top settings."""
        if isinstance(settings, Mapping):
            values = to_record(self)
            for part, value in settings.items():
                both = isinstance(value, Mapping) and isinstance(values.get(part), dict)
                values[part] = {**values[part], **value} if both else value
            return from_record(values)
        plan = self
        for text in settings:
            plan = plan.set(text)
        return plan

    def set(self, text: str) -> Plan:
        """This plan with one ``part.field=value`` applied: ``seed=3``, ``verify.draws=200``, or a setting of a variant,
        ``find.decision_clusters.alike=0.3``. The value is TOML, else a value of Python's, else plain text."""
        path, equals, value_text = text.partition("=")
        path = path.strip()
        if not equals:
            raise SettingError(f"{text!r} sets nothing", expected="part.field=value", remedy="--set verify.draws=200")
        fault: SettingError | None = None
        for value in _values(value_text):
            values = to_record(self)
            _put(values, path, value, value_text)
            try:
                return from_record(values)
            except SettingError as error:
                fault = fault or error
        raise fault or SettingError(f"{text!r} sets nothing", expected="part.field=value")

    @classmethod
    def read(cls, path: Path) -> Plan:
        """Read a TOML plan; what it leaves out keeps its default. Errors name the file."""
        values = read_toml(path)
        try:
            return from_record(values)
        except SettingError as error:
            raise SettingError(
                f"{path}: {error.what}", expected=error.expected, got=error.got, remedy=error.remedy
            ) from None

    def to_toml(self) -> str:
        """The whole plan as TOML; `read` gives it back."""
        return to_toml(to_record(self))


def settled(
    given: Plan | Path | None, settings: Sequence[str] | Mapping[str, Any] = (), allow_code: bool = False, **models: str
) -> Plan:
    """The plan to carry out: the one door through which every command and call comes.

    given        a plan, a TOML file, or None for the defaults
    settings     changes, as `Plan.changed` takes them
    allow_code   run code that a file names by import path; what `settings` or a `Plan` name is the caller's own
    models       ``base`` and ``tuned``, in place of the plan's

    Its paths are as every folder sees them, and all is checked that can be before a model is loaded. Raises
    `SettingError`, `VariantError` or `SourceError`.
    """
    before = given if isinstance(given, Plan) else Plan.read(given) if given is not None else Plan()
    named: dict[str, Any] = dict(models)
    plan: Plan = dataclasses.replace(before, **named).changed(settings)
    if not allow_code:
        own = {*Plan().changed(settings).imports(), *(before.imports() if isinstance(given, Plan) else ())}
        if foreign := [name for name in plan.imports() if name not in own]:
            raise SettingError(
                f"the plan names code of its own: {', '.join(foreign)}",
                expected="parts that ship with tunediff, or import paths given on the command line",
                remedy="--allow-code, if you trust whoever wrote the plan",
            )
    plan = _placed(plan)
    plan.check()
    return plan


def resolved(name: str, words: Sequence[str] = ()) -> str:
    """A file or folder as every folder sees it: from the root, without ``~``, ``..`` or links to folders.

    What names no file is returned as it is: one of `words`, a hub id, an empty text.
    """
    if not name or name in words:
        return name
    try:
        path = Path(name).expanduser()
        if path.is_dir():
            return str(path.resolve())
        if (
            path.exists() or glob.has_magic(name) or name.startswith((".", "/", "~"))
        ):  # a link to a file keeps its name, which tells its kind
            return str(path.parent.resolve() / path.name)
    except (OSError, RuntimeError, ValueError):  # too long, no such user's home, a null character: its reader tells
        pass
    return name


def _placed(settings: Any, part: str = "") -> Any:
    """A plan or part of it with every path as every folder sees it; raises `SettingError` for an empty one."""
    new: dict[str, Any] = {}
    for f in dataclasses.fields(settings):
        value, name = getattr(settings, f.name), f"{part}.{f.name}".strip(".")
        if dataclasses.is_dataclass(value):
            new[f.name] = _placed(value, name)
        elif "place" in f.metadata:
            words, many = f.metadata["place"], isinstance(value, tuple)
            paths = value if many else (value,)
            if "" in paths and "" not in words:
                raise SettingError(f"{name} is empty", expected="a path" + ", or [] for the default" * many)
            paths = tuple(resolved(path, words) for path in paths)
            new[f.name] = paths if many else paths[0]
    return dataclasses.replace(settings, **new)


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
            raise SettingError(
                f"{part}.{name} is no setting any more", expected=str(value), got=str(given), remedy="leave it out"
            )
    return kept


def _values(text: str) -> Iterator[Any]:
    """What a value on the command line may mean, likeliest first: TOML, a value of Python's, the text itself."""
    read = None
    try:
        table = tomllib.loads(f"x = {text}")
        read = [table["x"]] if list(table) == ["x"] else None
    except (ValueError, RecursionError):
        try:
            read = [ast.literal_eval(text.strip())]
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            pass
    if read:
        yield NONE if read[0] is None else read[0]
    if not (read and isinstance(read[0], (list, tuple, dict, set))):
        yield text


WITH_PARTS = {
    part.name
    for part in dataclasses.fields(Plan)
    if dataclasses.is_dataclass(part.default) and any(f.metadata.get("rest") for f in dataclasses.fields(part.default))
}
"""Parts of a plan that hold a table of settings for each variant they name: elicit, find, verify."""


def _put(values: dict[str, Any], path: str, value: Any, text: str) -> None:
    """Put a value at a dotted path of a plan's record; raises `SettingError` for a path that a plan has not."""
    *parents, last = _steps(path)
    target = values
    for depth, name in enumerate(parents):
        if depth == 1 and parents[0] in WITH_PARTS:
            target.setdefault(name, {})
        if not isinstance(target.get(name), dict):
            rest = [] if name in target else [*parents[depth + 1 :], last]
            raise _no_setting(name, target, parents[:depth], rest, path, text)
        target = target[name]
    if last not in target and len(parents) < 2 and parents != ["dictionary"]:
        raise _no_setting(last, target, parents, [], path, text)
    target[last] = value


def _no_setting(
    name: str, known: Iterable[str], before: list[str], after: list[str], path: str, text: str
) -> SettingError:
    """The error for a path whose step `name` is not among `known`; its remedy is an option that can be given."""
    error, near = unknown(name, known, path), nearest(name, known, cutoff=0.5)
    remedy = ""
    if near:
        meant = f"{'.'.join([*before, near, *after])}={text}"
        try:
            Plan().set(meant)
            remedy = f"--set {shlex.quote(meant)}"
        except SettingError as other:
            remedy = other.remedy
    return SettingError(error.what, expected=error.expected, remedy=remedy)


def _steps(path: str) -> list[str]:
    """The names along a dotted path; a variant's import path, quoted or not, is one name."""
    if ":" not in path:
        return path.split(".")
    part, _, rest = path.partition(".")
    name, _, last = rest.rpartition(".")
    return [part, name.strip("\"'"), last]
