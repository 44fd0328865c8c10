"""Typed: plain values (JSON, TOML) read as dataclasses, checked, and written back; the one reader of both."""

from __future__ import annotations

import dataclasses
import json
import math
import numbers
import os
import tomllib
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tunediff.core.errors import ArtifactError, SettingError, TunediffError
from tunediff.core.files import read_bytes
from tunediff.core.text import nearest

REST = {"rest": True}
"""Metadata of the one dataclass field that takes every table whose name is no other field."""
WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
"""Words that a setting takes for a truth value, in any case."""
NONE = "none"
"""The word that a setting takes for no value, as TOML has none of its own."""
LARGEST = 2**63 - 1
"""The largest whole number that a setting may be: the largest of 64 bits."""
DEEPEST = 64
"""Most levels of lists and objects inside a value that a record leaves open."""


@dataclasses.dataclass(frozen=True)
class Voice:
    """How faults are told: as damage of a file (`RECORD`) or as a setting that the user can mend (`SETTING`)."""

    error: type[TunediffError]
    unknown: str
    wrong: str
    suggests: bool


RECORD = Voice(ArtifactError, "{owner}: unknown field {name!r}", "{path}: wrong type", False)
SETTING = Voice(SettingError, "there is no setting {path!r}", "{path} is of the wrong type", True)


def unknown(name: str, known: Iterable[str], path: str, voice: Voice = SETTING) -> TunediffError:
    """The error for a name that is not among `known`; a setting's error names the nearest."""
    owner = path.rpartition(".")[0]
    names = list(known)
    near = nearest(name, names, cutoff=0.5) if voice.suggests else ""
    what = voice.unknown.format(owner=owner, name=name, path=path)
    meant = f"{owner}.{near}".strip(".")
    return voice.error(what, expected=", ".join(names), remedy=f"{meant} in place of {path}" if near else "")


def typed(kind: Any, value: Any, where: str = "", voice: Voice = RECORD) -> Any:
    """`value`, plain JSON or TOML, as `kind`: a dataclass, list, tuple, dict, union or scalar type.

    An int serves as a float. In a record null stands for a float that is not a number. A setting is read as its user
    meant it: a single value serves as a tuple of one, ``1e4`` as a whole number, ``yes`` as a truth value, ``none`` as
    no value, a path as text. `where` is the path that errors name. Raises the voice's error.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value if voice.suggests else _shallow(value, where, voice)
    if origin in (typing.Union, types.UnionType):
        if type(None) in arguments and (value is None or (voice.suggests and _is_none(value))):
            return None
        return typed(next(a for a in arguments if a is not type(None)), value, where, voice)
    if voice.suggests:
        value = _meant(kind, value)
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        return _dataclass(kind, value, where, voice)
    if origin is list and isinstance(value, list):
        return [typed(arguments[0], item, f"{where}[{i}]", voice) for i, item in enumerate(value)]
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(typed(arguments[0], item, f"{where}[{i}]", voice) for i, item in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {name: typed(arguments[1], item, f"{where}.{name}", voice) for name, item in value.items()}
    if kind is float and value is None and not voice.suggests:
        return float("nan")
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return _finite(value, where, voice)
    if isinstance(kind, type) and isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        if isinstance(value, int) and voice.suggests and not -LARGEST <= value <= LARGEST:
            raise voice.error(f"{where} is out of range", expected="a whole number of 64 bits", got=_short(value))
        return value
    wanted = _words(kind) if voice.suggests else str(kind)
    got = _short(value) if voice.suggests else type(value).__name__
    raise voice.error(voice.wrong.format(path=where), expected=wanted, got=got)


def _meant(kind: Any, value: Any) -> Any:
    """A setting's value as its field has it, where only the spelling differs."""
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    elif isinstance(value, numbers.Real) and not isinstance(value, (bool, int, float)):  # a number of numpy's
        value = int(value) if isinstance(value, numbers.Integral) else float(value)
    if typing.get_origin(kind) is tuple and not isinstance(value, (list, tuple, dict)):
        return (value,)
    if kind is bool and isinstance(value, str):
        return WORDS.get(value.strip().casefold(), value)
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _is_none(value: Any) -> bool:
    return isinstance(value, str) and value.strip().casefold() == NONE


def _finite(value: int | float, where: str, voice: Voice) -> float:
    """A number as a float; a setting's is finite."""
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if voice.suggests and not math.isfinite(number):
        raise voice.error(f"{where} is out of range", expected="a finite number", got=_short(value))
    return number


def _shallow(value: Any, where: str, voice: Voice) -> Any:
    """An open value as it is; raises where lists and objects are nested deeper than `DEEPEST`."""
    level = [value]
    for _ in range(DEEPEST):
        level = [
            inner
            for item in level
            if isinstance(item, (dict, list))
            for inner in (item.values() if isinstance(item, dict) else item)
        ]
        if not level:
            return value
    raise voice.error(f"{where} is nested too deep", expected=f"at most {DEEPEST} levels")


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of more digits than Python writes
        text = type(value).__name__
    return text if len(text) <= 80 else text[:79] + "…"


def _words(kind: Any) -> str:
    """A type as a user reads it."""
    plain = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    if kind in plain:
        return plain[kind]
    if dataclasses.is_dataclass(kind):
        return "a table of settings: " + ", ".join(f.name for f in dataclasses.fields(kind))
    inner = _words(typing.get_args(kind)[0]).removeprefix("a ") if typing.get_origin(kind) is tuple else ""
    return f"a list, each {inner}" if inner else "a table"


def _dataclass(kind: Any, value: dict[str, Any], where: str, voice: Voice) -> Any:
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    rest = next((name for name, f in fields.items() if f.metadata.get("rest")), None)
    given: dict[str, Any] = {}
    for name in sorted(value, key=str):
        path = f"{where}.{name}".strip(".")
        if name in fields and name != rest:
            given[name] = typed(hints[name], value[name], path, voice)
        elif rest and isinstance(value[name], dict):
            given.setdefault(rest, {})[name] = value[name]
        else:
            raise unknown(str(name), [n for n in fields if n != rest], path, voice)
    for name, f in fields.items():
        optional = f.default is not dataclasses.MISSING or f.default_factory is not dataclasses.MISSING
        if name not in given and not optional:
            raise voice.error(f"{where}: field {name!r} is missing")
    return kind(**given)


def record(value: Any) -> Any:
    """A dataclass as nested plain values, its tables of the rest beside its other fields; `typed` gives it back."""
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    out: dict[str, Any] = {}
    for f in dataclasses.fields(value):
        if f.metadata.get("rest"):
            out.update({name: dict(table) for name, table in getattr(value, f.name).items()})
        else:
            out[f.name] = record(getattr(value, f.name))
    return out


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file as nested plain values; raises `SettingError` for one that is missing, no ordinary file or not TOML."""
    data = read_bytes(path, SettingError, "a TOML plan")
    try:
        return tomllib.loads(data.decode("utf-8-sig").replace("\r\n", "\n"))
    except (ValueError, RecursionError) as error:
        raise SettingError(f"{path} is not valid TOML", got=str(error)) from None


def to_toml(values: dict[str, Any]) -> str:
    """Nested plain values as TOML: scalars first, then a table each; what is None is the word `NONE`."""
    return "\n".join(_table(values, ())) + "\n"


def _table(values: dict[str, Any], path: tuple[str, ...]) -> list[str]:
    plain = {name: value for name, value in values.items() if not isinstance(value, dict)}
    lines = [f"{_key(name)} = {toml_value(value)}" for name, value in plain.items()]
    for name, value in values.items():
        if isinstance(value, dict):
            inner = (*path, name)
            lines += ["", "[" + ".".join(map(_key, inner)) + "]", *_table(value, inner)]
    return lines


def _key(name: str) -> str:
    bare = name.replace("_", "").replace("-", "")
    return name if bare.isascii() and bare.isalnum() else toml_value(name)


def toml_value(value: Any) -> str:
    """One value as TOML writes it; raises `SettingError` for text that is no UTF-8."""
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise SettingError(f"{value!r} is not text", expected="UTF-8") from None
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, bool):
        return "true" if value else "false"
    return toml_value(NONE) if value is None else repr(value)
