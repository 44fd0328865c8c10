"""Write a digest of each variant's source file as of this version: ``python tools/make_released_sources.py``.

Run this script when the version in pyproject.toml changes. If a variant's file differs from its stored digest, the
file's new digest enters the content keys. Results of an edited variant are therefore never mistaken for older ones.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
from pathlib import Path

from tunediff.core.variants import RELEASED, digest_of

PACKAGES = (
    "tunediff.changes.finders",
    "tunediff.changes.signals",
    "tunediff.changes.trials",
    "tunediff.dictionaries.architectures",
    "tunediff.harvests.elicitors",
    "tunediff.models.families",
)


def digests() -> dict[str, str]:
    """Digests of all variants' files and of the helper files beside them, by module name."""
    found = {}
    for package in PACKAGES:
        for info in pkgutil.iter_modules(importlib.import_module(package).__path__):
            if info.name != "base":
                path = Path(importlib.import_module(f"{package}.{info.name}").__file__ or "")
                found[f"{package}.{info.name}"] = digest_of(path.read_text(encoding="utf-8"))
    return found


if __name__ == "__main__":
    RELEASED.parent.mkdir(exist_ok=True)
    RELEASED.write_text(json.dumps(digests(), indent=1, sort_keys=True) + "\n", encoding="utf-8")
