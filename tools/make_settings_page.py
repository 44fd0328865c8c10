"""Make docs/settings.md from the docstrings of the settings' fields: ``python tools/make_settings_page.py``."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
from pathlib import Path

from tunediff.changes.finders.base import Finder
from tunediff.changes.signals.base import Signal
from tunediff.changes.trials.base import Trial
from tunediff.core import variants
from tunediff.core.typed import toml_value
from tunediff.harvests.elicitors.base import Elicitor
from tunediff.runs.plan import Plan

VARIANTS = {"find": (Finder, Signal), "verify": (Trial,), "elicit": (Elicitor,)}
"""Kind of variant whose settings stand in each part of a plan."""

PAGE = Path(__file__).resolve().parent.parent / "docs" / "settings.md"

HEAD = """# Settings

Every setting of a run, its default, and what it does. This page is made from the source by
`tools/make_settings_page.py`.

A setting is changed on the command line by `--set part.field=value` (repeatable), or in a TOML file given with
`--plan`:

```toml
seed = 1

[verify]
draws = 200
```

Values are read as TOML, as a value of Python's, and as plain text where they are neither: `--set find.finders='["principal"]'`,
`--set verify.draws=1e3`, `--set edit.spread=False`, `--set fit.steps=none`, `--set pair.dtype=bfloat16`. One value serves as a list of one.
A path is looked for in the current folder, and the plan keeps it from the root. Settings of a finder, signal or trial follow its name:
`--set find.decision_clusters.alike=0.3`, `--set verify.steer.controls=8`. What a plan leaves out keeps its default. An unknown name or a value out of range is
refused before any work, and the nearest known name is told. `runs/NAME/plan.toml` holds the whole plan of the last
command in that run.

Each stage's folder is keyed by everything its result depends on. A changed setting starts a folder beside the old one
for the stages it reaches; the others are taken as they are. Settings under `runtime` are in no key.
"""


def docstrings(kind: type) -> dict[str, str]:
    """Docstring of each field of a settings class and of its parent classes, by field name."""
    found: dict[str, str] = {}
    for owner in reversed(kind.__mro__):
        if dataclasses.is_dataclass(owner):
            body = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0].body
            for statement, after in zip(body, body[1:]):
                if isinstance(statement, ast.AnnAssign) and isinstance(after, ast.Expr):
                    found[statement.target.id] = " ".join(after.value.value.split())
    return found


def summary(kind: type) -> str:
    """The first sentence of a class's docstring."""
    return " ".join(inspect.getdoc(kind).split("\n\n")[0].split())


def table(part: str, kind: type) -> list[str]:
    """One part of the plan as a Markdown table of settings."""
    texts = docstrings(kind)
    lines = ["| setting | default | what it does |", "|---|---|---|"]
    for field in dataclasses.fields(kind):
        made = field.default_factory is not dataclasses.MISSING
        default = {} if made else field.default
        if field.metadata.get("rest") or dataclasses.is_dataclass(default) or (made and not part):
            continue
        shown = "derived" if default is None else f"`{toml_value(default)}`"
        name = f"{part}.{field.name}" if part else field.name
        lines.append(f"| `{name}` | {shown} | {texts[field.name].replace('|', chr(92) + '|')} |")
    return lines


def variant_tables(part: str, base: type) -> list[str]:
    """Markdown tables of the settings of each variant of `base` that has settings."""
    lines = []
    package = base.__module__.rpartition(".")[0]
    for name in variants.names(package):
        kind = variants.load(package, name)
        if dataclasses.fields(kind):
            what = f"Settings of the {variants.kind_of(package)} `{name}`."
            lines += ["", f"### `{part}.{name}`", "", what, "", *table(f"{part}.{name}", kind)]
    return lines


def page() -> str:
    """The whole page as Markdown."""
    lines = [HEAD, "## The run", "", *table("", Plan)]
    for field in dataclasses.fields(Plan):
        if dataclasses.is_dataclass(field.default):
            kind = type(field.default)
            lines += ["", f"## {field.name}", "", summary(kind), "", *table(field.name, kind)]
            for base in VARIANTS.get(field.name, ()):
                lines += variant_tables(field.name, base)
        elif field.name == "dictionary":
            lines += [
                "",
                "## dictionary",
                "",
                "Settings of the dictionary that `find.dictionary` names; each has its own.",
            ]
            for name in variants.names("tunediff.dictionaries.architectures"):
                kind = variants.load("tunediff.dictionaries.architectures", name)
                lines += ["", f"### `{name}`", "", summary(kind), "", *table("dictionary", kind.Spec)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(), encoding="utf-8")
