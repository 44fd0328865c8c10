"""The verbs for Python: `diff`, `revert` and `report`, each as the command of its name.

Settings are keyword arguments by part: ``diff(base, tuned, seed=3, contrast={"prompts": 64})`` is
``tunediff diff BASE TUNED --set seed=3 --set contrast.prompts=64``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from tunediff.core.errors import ArtifactError, PairError, SettingError
from tunediff.core.progress import Progress, ProgressBar, quiet
from tunediff.edits.edit import Edit
from tunediff.models.adapters import Adapter
from tunediff.models.loading import load_frozen, located
from tunediff.models.network import LanguageModel
from tunediff.models.pair import Pair
from tunediff.records import diff as records
from tunediff.records.diff import Bill
from tunediff.reports.notebook import summary_html
from tunediff.reports.page import write_report
from tunediff.runs.plan import Plan, settled
from tunediff.runs.run import Run

Model = str | Path | tuple[nn.Module, Any]
"""A model: a folder, hub id, GGUF file, adapter folder, ``default`` or ``demo``; or a (model, tokenizer) of transformers."""


@dataclass(frozen=True)
class Diff(records.Diff):
    """The finding of `diff`: the record that ``diff.json`` holds, and the run it came from.

    A notebook shows it as a summary. `changes` are the ranked changes with their evidence, `confirmed` those that
    stood every trial, `scan` and `signals` the other evidence. `edit` and `bill` go on with the run in memory.
    """

    @classmethod
    def of(cls, run: Run, record: records.Diff) -> Diff:
        """The record of a run, with the run at hand."""
        found = cls(**{name: getattr(record, name) for name in record.__dataclass_fields__})
        object.__setattr__(found, "_run", run)
        return found

    @property
    def run(self) -> Run:
        """The run this came from; raises `ArtifactError` for a record that was loaded from a file."""
        run: Run | None = getattr(self, "_run", None)
        if run is None:
            raise ArtifactError(
                "this record was loaded from a file, without its run",
                expected="a Diff that tunediff.diff returned",
                remedy="tunediff.diff(base, tuned), which skips what is finished",
            )
        return run

    def edit(self, changes: Sequence[str] = ()) -> Edit:
        """The edit that takes changes out of the tuned model, by their ids; all confirmed ones if none is named.

        ``edit.applied(model)`` gives the edited model, ``edit.save(folder)`` keeps it.
        """
        with _evaluating(*_given(self.run)):
            return self.run.edit(list(changes) or self.run.undoable)[0]

    def bill(self, changes: Sequence[str] = ()) -> Bill:
        """What taking changes out does and costs, by their ids; all confirmed ones if none is named."""
        with _evaluating(*_given(self.run)):
            return self.run.bill(list(changes) or self.run.undoable)

    def _repr_html_(self) -> str:
        return summary_html(self)


def diff(
    base: Model = "default",
    tuned: Model = "demo",
    *,
    run: str | None = None,
    runs: str | Path = "runs",
    plan: str | Path | Plan | None = None,
    undo: bool = True,
    progress: bool = False,
    allow_code: bool = False,
    **settings: Any,
) -> Diff:
    """Find what changed between two models, prove it, measure what undoing it costs, and write a report.

    base, tuned   each a path or id, or a (model, tokenizer) pair of transformers, which is left as it was
    run, runs     the run is kept in ``runs/RUN``; by default RUN is made from the models' names
    plan          settings to start from: a TOML file or a `Plan`
    undo          whether to measure what undoing the first confirmed changes costs
    progress      whether to print progress on stderr
    allow_code    run code that a plan file names by import path
    settings      a part's settings as a dict, or a top setting as its value: ``verify={"draws": 200}, seed=3``

    Raises `SettingError`, `SourceError`, `PairError` and their like, all of them `TunediffError`.
    """
    names = [_name(base, "base"), _name(tuned, "tuned")]
    given = plan if isinstance(plan, Plan) or plan is None else Path(plan)
    chosen = settled(given, settings, allow_code, base=names[0], tuned=names[1])
    bar: Progress = ProgressBar(sys.stderr) if progress else quiet
    in_memory = [model[0] for model in (base, tuned) if isinstance(model, tuple)]
    with _evaluating(*in_memory):
        made = Run.begin(chosen, Path(runs), run, bar, _pair(base, tuned, names, chosen))
        return Diff.of(made, made.conclude(undo))


def revert(
    found: Diff | str | Path,
    changes: Sequence[str] = (),
    *,
    cost: float | None = None,
    bake: str | Path | None = None,
    finding: int = 0,
    allow_code: bool = False,
    **settings: Any,
) -> Bill:
    """Take changes, or a whole finding, out of the tuned model, and return what that does and costs.

    found     a `Diff` of this session, or a run's folder
    changes   ids of changes to take out; all confirmed ones if none is named
    cost      take them out as strongly as so many nats a token on neutral text allow
    bake      write the edited model to this folder, as transformers reads it
    finding   place of a finding from 1 on, in place of changes: all of its changes, and its answers
    settings  of the run in a folder, as `diff` takes them; ``base`` and ``tuned`` say where its models have moved to
    """
    if isinstance(found, Diff) and settings:
        raise SettingError(
            "a Diff has its settings", expected="a run's folder", remedy="tunediff.revert(found.run.folder)"
        )
    opened = found.run if isinstance(found, Diff) else Run.open(Path(found), settings, allow_code)
    with _evaluating(*_given(opened)):
        return opened.revert(changes, cost, Path(bake) if bake is not None else None, finding)


def report(found: records.Diff | str | Path, path: str | Path | None = None) -> Path:
    """Write the report as one HTML file, and return its path.

    found   a `Diff`, or a run's folder
    path    the file; by default ``report.html`` in the run's folder
    """
    record = found if isinstance(found, records.Diff) else records.Diff.load(Path(found) / "diff.json")
    if path is not None:
        target = Path(path)
    elif isinstance(found, (str, Path)):
        target = Path(found) / "report.html"
    elif isinstance(found, Diff):
        target = found.run.folder / "report.html"
    else:
        raise SettingError("a record without its run has no folder", expected="the file to write", remedy="path=")
    write_report(record, target)
    return target


def _name(model: Model, side: str) -> str:
    if isinstance(model, (str, Path)):
        return str(model)
    if not (isinstance(model, tuple) and len(model) == 2 and isinstance(model[0], nn.Module)):
        raise PairError(
            f"{side} is no model", expected="a path, an id, or (model, tokenizer)", got=type(model).__name__
        )
    config = getattr(model[0], "config", None)
    return str(getattr(config, "_name_or_path", "") or type(model[0]).__name__)


def _pair(base: Model, tuned: Model, names: Sequence[str], plan: Plan) -> Pair | None:
    """The pair of models that are given in memory; None where both are to be loaded."""
    if isinstance(base, (str, Path)) and isinstance(tuned, (str, Path)):
        return None
    sides = []
    for model, name in zip((base, tuned), names):
        if isinstance(model, (str, Path)):
            if Adapter.at(located(name), name):
                raise PairError(
                    f"{name} is an adapter, whose base is given in memory",
                    expected="both as paths, or both in memory",
                    remedy="PeftModel.from_pretrained(model, adapter).merge_and_unload(), with its tokenizer",
                )
            loaded = load_frozen(name, plan.pair.dtype, plan.runtime.device)
            module, tokenizer = loaded.module, loaded.tokenizer
        else:
            module, tokenizer = model
            if hasattr(module, "get_base_model"):
                raise PairError(
                    f"{name} is a PEFT model in memory",
                    expected="an ordinary model, or the adapter's folder with its base's path",
                    remedy="model.merge_and_unload()",
                )
        sides.append(LanguageModel(module, tokenizer, name, fast=plan.runtime.fast, family=plan.pair.family))
    return Pair.of(sides[0], sides[1], plan.pair.allow_identical, plan.pair.allow_unrelated)


def _given(run: Run) -> list[nn.Module]:
    """The networks of a run that were given in memory."""
    return [run.given.base.module, run.given.tuned.module] if run.given is not None else []


@contextmanager
def _evaluating(*networks: nn.Module) -> Iterator[None]:
    """Inside, networks given in memory are in evaluation mode; afterwards each module is in the mode it was in."""
    modules = [module for network in networks for module in network.modules()]
    before = [module.training for module in modules]
    try:
        for module in modules:
            module.training = False
        yield
    finally:
        for module, training in zip(modules, before):
            module.training = training
