"""Organisms: fine-tunes whose truth is known, one file each; the file's name with hyphens is the organism's.

A file that varies one thing offers several, ORGANISMS, whose names begin with it.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from typing import TYPE_CHECKING

from tunediff.core.errors import VariantError

if TYPE_CHECKING:
    from tunediff.lab.organisms.base import Organism

HELPERS = ("base", "instructions", "neutral", "training")


def every() -> list[Organism]:
    """Every organism, by name."""
    names = sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name not in HELPERS)
    modules = [importlib.import_module(f"{__name__}.{name}") for name in names]
    return [o for module in modules for o in getattr(module, "ORGANISMS", None) or (module.ORGANISM,)]


def named(name: str) -> Organism:
    """The organism of that name; raises `VariantError` with the nearest one."""
    known = {organism.name: organism for organism in every()}
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        raise VariantError(
            f"there is no organism called {name!r}", expected=", ".join(known), remedy=near[0] if near else ""
        )
    return known[name]
