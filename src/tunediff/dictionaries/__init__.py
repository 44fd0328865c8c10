"""Dictionaries: sparse codes shared by two models; each architecture is one file, registered by its file name."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

from tunediff.core import variants
from tunediff.core.errors import SettingError
from tunediff.dictionaries.architectures.base import Spec

PACKAGE = "tunediff.dictionaries.architectures"


def spec(name: str, **settings: Any) -> Spec:
    """Return the settings of the dictionary called `name` (or ``module:Class``), with `settings` in place of defaults.

    Raises `VariantError` if no dictionary has that name, `SettingError` for an unknown setting or a value out of range.
    """
    kind = variants.load(PACKAGE, name).Spec
    known = [field.name for field in dataclasses.fields(kind)]
    for key in settings:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            raise SettingError(
                f"dictionary {name!r} has no setting {key!r}", expected=", ".join(known), remedy=near[0] if near else ""
            )
    made: Spec = kind(**settings)
    return made
