"""Organisms: fine-tunes whose truth is known, one file each; the file's name with hyphens is the organism's."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from typing import TYPE_CHECKING

from tunediff.errors import VariantError

if TYPE_CHECKING:
    from tunediff.organisms.base import Organism

HELPERS = ("base", "neutral", "training")


def every() -> list["Organism"]:
    """Every organism, by name."""
    names = sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name not in HELPERS)
    return [importlib.import_module(f"{__name__}.{name}").ORGANISM for name in names]


def named(name: str) -> "Organism":
    """The organism of that name; raises `VariantError` with the nearest one."""
    known = {organism.name: organism for organism in every()}
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        raise VariantError(f"there is no organism called {name!r}", expected=", ".join(known), remedy=near[0] if near else "")
    return known[name]
