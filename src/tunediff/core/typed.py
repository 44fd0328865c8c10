"""Typed: plain values (JSON, TOML) read as dataclasses, checked, and written back; the one reader of both."""

from __future__ import annotations

import dataclasses
import difflib
import json
import tomllib
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tunediff.core.errors import ArtifactError, SettingError, TunediffError

REST = {"rest": True}
"""Metadata of the one dataclass field that takes every table whose name is no other field."""


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
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.0) if voice.suggests else []
    what = voice.unknown.format(owner=owner, name=name, path=path)
    return voice.error(what, expected=", ".join(names), remedy=near[0] if near else "")


def typed(kind: Any, value: Any, where: str = "", voice: Voice = RECORD) -> Any:
    """`value`, plain JSON or TOML, as `kind`: a dataclass, list, tuple, dict, union or scalar type.

    An int serves as a float. In a record null stands for a float that is not a number. A single string serves as a
    tuple of one in a setting. `where` is the path that errors name. Raises the voice's error.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return typed(next(a for a in arguments if a is not type(None)), value, where, voice)
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        return _dataclass(kind, value, where, voice)
    if origin is list and isinstance(value, list):
        return [typed(arguments[0], item, f"{where}[{i}]", voice) for i, item in enumerate(value)]
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(typed(arguments[0], item, where, voice) for item in value)
    if origin is tuple and isinstance(value, str) and voice.suggests:
        return (value,)
    if origin is dict and isinstance(value, dict):
        return {name: typed(arguments[1], item, f"{where}.{name}", voice) for name, item in value.items()}
    if kind is float and value is None and not voice.suggests:
        return float("nan")
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if isinstance(kind, type) and isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    wanted = kind.__name__ if isinstance(kind, type) and voice.suggests else str(kind)
    got = repr(value) if voice.suggests else type(value).__name__
    raise voice.error(voice.wrong.format(path=where), expected=wanted, got=got)


def _dataclass(kind: Any, value: dict[str, Any], where: str, voice: Voice) -> Any:
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    rest = next((name for name, f in fields.items() if f.metadata.get("rest")), None)
    given: dict[str, Any] = {}
    for name in sorted(value):
        path = f"{where}.{name}".strip(".")
        if name in fields and name != rest:
            given[name] = typed(hints[name], value[name], path, voice)
        elif rest and isinstance(value[name], dict):
            given.setdefault(rest, {})[name] = value[name]
        else:
            raise unknown(name, [n for n in fields if n != rest], path, voice)
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
    """A TOML file as nested plain values; raises `SettingError` for one that is missing or not TOML."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SettingError(f"{path} does not exist", expected="a TOML plan") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingError(f"{path} is not valid TOML", got=str(error)) from None


def to_toml(values: dict[str, Any]) -> str:
    """Nested plain values as TOML: scalars first, then a table each; what is None is left out."""
    return "\n".join(_table(values, ())) + "\n"


def _table(values: dict[str, Any], path: tuple[str, ...]) -> list[str]:
    plain = {name: value for name, value in values.items() if not isinstance(value, dict)}
    lines = [f"{_key(name)} = {toml_value(value)}" for name, value in plain.items() if value is not None]
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
    return repr(value)
