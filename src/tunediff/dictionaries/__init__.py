"""Dictionaries: sparse codes shared by two models; each architecture is one file, registered by its file name."""

from __future__ import annotations

import dataclasses
from typing import Any

from tunediff.core import variants
from tunediff.core.errors import VariantError
from tunediff.core.typed import SETTING, typed
from tunediff.dictionaries.architectures.base import Dictionary, Spec

PACKAGE = "tunediff.dictionaries.architectures"


def spec(name: str, typed_as: str = "{}", /, **settings: Any) -> Spec:
    """Return the settings of the dictionary called `name` (or ``module:Class``), with `settings` in place of defaults.

    Nothing of an import path is called before it is known to be a dictionary. Raises `VariantError` if there is none
    of that name (see `variants.load` for `typed_as`), `SettingError` for an unknown setting, a wrong type or a value
    out of range.
    """
    kind = getattr(variants.checked(Dictionary, name, variants.load(PACKAGE, name, typed_as)), "Spec", None)
    if not (isinstance(kind, type) and issubclass(kind, Spec)):
        raise VariantError(f"{name} has no settings", expected="a subclass of Spec as Spec", got=repr(kind))
    made: Spec = typed(kind, settings, "dictionary", SETTING)
    # Content keys hold a whole number for a float as it was given, so that results of it are still found.
    whole = {name: value for name, value in settings.items() if type(value) is int and value == getattr(made, name)}
    return dataclasses.replace(made, **whole)
