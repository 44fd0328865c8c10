"""tunediff finds what fine-tuning changed inside a model, proves it by intervening, and undoes it.

    import tunediff

    found = tunediff.diff("my-base", "my-tune", contrast={"prompts": 64})
    found.changes, found.edit(["decision_clusters/resid.28-0"])

Names are loaded when they are first used: ``import tunediff`` loads neither torch nor numpy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tunediff.api import Diff, diff, report, revert
    from tunediff.core.errors import TunediffError
    from tunediff.edits.edit import Edit
    from tunediff.models.pair import Pair
    from tunediff.records.change import Change
    from tunediff.records.profile import Profile
    from tunediff.runs.plan import Plan
    from tunediff.texts.corpus import Corpus

__version__ = "0.1.0"

_HOMES = {
    "diff": "api",
    "revert": "api",
    "report": "api",
    "Diff": "api",
    "Pair": "models.pair",
    "Corpus": "texts.corpus",
    "Change": "records.change",
    "Profile": "records.profile",
    "Edit": "edits.edit",
    "Plan": "runs.plan",
    "TunediffError": "core.errors",
}
"""The public names, and the module that each is loaded from."""

__all__ = [
    "Change", "Corpus", "Diff", "Edit", "Pair", "Plan", "Profile", "TunediffError", "diff", "report", "revert",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tunediff' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"tunediff.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
