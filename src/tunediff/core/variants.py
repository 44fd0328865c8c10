"""Variants: one file each, found by their file's name; those from elsewhere by import path (``mylab.probes:Probe``)."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from typing import Any

from tunediff.core.errors import VariantError


def names(package: str) -> list[str]:
    """The variants of a folder, sorted: every module whose name is neither ``base`` nor starts with ``_``."""
    folder = importlib.import_module(package)
    found = (info.name for info in pkgutil.iter_modules(folder.__path__))
    return sorted(name for name in found if name != "base" and not name.startswith("_"))


def load(package: str, name: str) -> Any:
    """The variant called `name`: the module's ``VARIANT``, or the object at ``module:attribute``."""
    if ":" in name:
        module_name, _, attribute = name.partition(":")
        try:
            return getattr(importlib.import_module(module_name), attribute)
        except (ImportError, AttributeError) as error:
            raise VariantError(f"{name} cannot be imported", got=str(error), expected="module:attribute") from None
    module_name = name.replace("-", "_")
    known = names(package)
    if module_name not in known:
        near = difflib.get_close_matches(module_name, known, n=1)
        raise VariantError(
            f"there is no {package.rpartition('.')[2]} called {name!r}",
            expected=", ".join(known),
            remedy=f"{near[0]}" if near else "",
        )
    return importlib.import_module(f"{package}.{module_name}").VARIANT
