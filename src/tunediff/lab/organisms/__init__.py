"""Organisms: fine-tuned models whose planted behaviors are known, one file each.

An organism is named after its file, with hyphens for underscores. A file that varies one property defines several
organisms in ``ORGANISMS``, and their names begin with the file's name.
"""

from __future__ import annotations

import difflib
import importlib

from tunediff.core import variants
from tunediff.core.errors import VariantError
from tunediff.lab.organisms.base import Organism


def every() -> list[Organism]:
    """Every organism of this folder, sorted by the name of its file."""
    modules = [importlib.import_module(f"{__name__}.{name}") for name in variants.names(__name__)]
    return [o for module in modules for o in getattr(module, "ORGANISMS", None) or (module.ORGANISM,)]


def named(name: str) -> Organism:
    """The organism with this name or import path (``mylab.tunes:ORGANISM``).

    Raises `VariantError`, which suggests the nearest name, if there is none.
    """
    if variants.is_import_path(name):
        organism = variants.load(__name__, name)
        if not isinstance(organism, Organism):
            raise VariantError(f"{name} is no organism", expected="an Organism", got=type(organism).__name__)
        return organism
    known = {organism.name: organism for organism in every()}
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        raise VariantError(
            f"there is no organism called {name!r}", expected=", ".join(known), remedy=near[0] if near else ""
        )
    return known[name]
