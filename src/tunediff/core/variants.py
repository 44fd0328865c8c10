"""Variants: methods of which there are many, one file each, made by name with their settings.

A variant that ships is named by its file (``principal``), one from elsewhere by its import path
(``mylab.probes:Probe``). Its settings are the fields of its frozen dataclass.
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import importlib
import importlib.util
import inspect
import json
import pkgutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from tunediff.core.artifacts import default_of
from tunediff.core.errors import VariantError
from tunediff.core.text import nearest
from tunediff.core.typed import SETTING, typed

T = TypeVar("T")

RELEASED = Path(__file__).parent / "assets" / "released_sources.json"
"""Digests of the variants' files as of this version, by module; made by ``tools/make_released_sources.py``."""


def names(package: str) -> list[str]:
    """The variants of a folder, sorted: every module whose name is neither ``base`` nor starts with ``_``."""
    folder = importlib.import_module(package)
    found = (info.name for info in pkgutil.iter_modules(folder.__path__))
    return sorted(name for name in found if name != "base" and not name.startswith("_"))


def is_import_path(name: str) -> bool:
    """Whether a name is an import path (``module:attribute``): making it runs code that does not ship."""
    return ":" in name


def load(package: str, name: str, typed_as: str = "{}") -> Any:
    """The variant called `name`: the module's ``VARIANT``, or the object at ``module:attribute``.

    Raises `VariantError` where there is none; its remedy is the nearest name, put into `typed_as`.
    """
    if is_import_path(name):
        return _imported_object(name)
    module_name = name.replace("-", "_")
    known = names(package)
    if module_name not in known:
        near = nearest(module_name, known)
        raise VariantError(
            f"there is no {kind_of(package)} called {name!r}",
            expected=", ".join(known),
            remedy=typed_as.format(near) if near else "",
        )
    return importlib.import_module(f"{package}.{module_name}").VARIANT


def _imported_object(name: str) -> Any:
    """What an import path names; its module's code runs, and whatever that raises is told as the path's fault."""
    module_name, _, attribute = name.partition(":")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # last, so that nothing here stands before what is installed
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except (Exception, SystemExit) as error:
        got = f"{type(error).__name__}: {error}"
        raise VariantError(f"{name} cannot be imported", got=got, expected="module:attribute") from None


def kind_of(package: str) -> str:
    """What the variants of a folder are called, in the singular: ``finder``, ``family``."""
    plural = package.rpartition(".")[2]
    return plural.removesuffix("ies") + "y" if plural.endswith("ies") else plural.removesuffix("s")


def make(
    base: type[T], name: str, settings: Mapping[str, Any] | None = None, part: str = "", typed_as: str = "{}"
) -> T:
    """The variant of `base` called `name`, with `settings` for its fields; `part` is the plan's part that holds them.

    Nothing of an import path is called before it is known to be a whole class of the right kind. Raises `VariantError`
    (see `load` for `typed_as`) if there is none or it is no subclass of `base`, `SettingError` for settings that do not
    fit.
    """
    kind = load(base.__module__.rpartition(".")[0], name, typed_as)
    made: T = typed(checked(base, name, kind), dict(settings or {}), f"{part}.{name}".strip("."), SETTING)
    return made


def checked(base: type[T], name: str, kind: Any) -> type[T]:
    """`kind`, which `name` stands for, if it is a subclass of `base` with all its methods; raises `VariantError`."""
    if not (isinstance(kind, type) and issubclass(kind, base)):
        what = kind_of(base.__module__.rpartition(".")[0])
        raise VariantError(f"{name} is no {what}", expected=f"a subclass of {base.__name__}", got=repr(kind))
    if inspect.isabstract(kind):
        missing = ", ".join(sorted(kind.__abstractmethods__))  # type: ignore[attr-defined]
        raise VariantError(f"{name} is not whole", expected=f"methods {missing}", got="an abstract class")
    return kind


def identity(made: Any) -> list[Any]:
    """What a result depends on besides a variant's name, for a content key: settings that are not at their default, and
    the digest of its source. Empty for a variant as it ships."""
    at_default = {f.name: default_of(f) for f in dataclasses.fields(made)}
    changed = {name: getattr(made, name) for name, value in at_default.items() if getattr(made, name) != value}
    digest = source(type(made))  # type: ignore[arg-type]
    return [part for part in (changed, digest) if part]


def source(kind: type) -> str:
    """A 16-digit digest of the code that a variant is made of; empty where all of it is as in this version.

    That code is the file of the class and of each class it inherits from, and what these import from nearby: from the
    same folder for variants that ship, from the same package or folder for others. Comments, docstrings and layout do
    not count. Imports inside functions count; files that are read and modules from further away do not.
    """
    parts = {}
    released = json.loads(RELEASED.read_text(encoding="utf-8")) if RELEASED.is_file() else {}
    for module in sorted({owner.__module__ for owner in kind.__mro__ if _counts(owner.__module__, kind.__module__)}):
        for name, path in _nearby(module):
            digest = digest_of(path.read_text(encoding="utf-8")) if path else _own_digest(kind)
            if released.get(name) != digest:
                parts[name] = digest
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16] if parts else ""


def digest_of(text: str) -> str:
    """A 16-digit digest of a module's code, without comments, docstrings, layout, and names of tunediff's modules."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [s for s in body if not _is_text(s) and not _is_own_import(s)]  # type: ignore[attr-defined]
    return hashlib.sha256(repr(_shape(tree)).encode()).hexdigest()[:16]


def _shape(node: Any) -> Any:
    """A syntax tree as nested tuples, without what is empty: versions of Python differ in what they leave empty."""
    if isinstance(node, ast.AST):
        fields = ((name, _shape(value)) for name, value in ast.iter_fields(node) if value not in (None, []))
        return (type(node).__name__, *fields)
    return tuple(map(_shape, node)) if isinstance(node, list) else node


def _is_text(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )


def _is_own_import(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.ImportFrom) and (statement.module or "").split(".")[0] == "tunediff"


def _own_digest(kind: type) -> str:
    """The digest of a class that is in no file, such as a notebook's."""
    try:
        return digest_of(inspect.cleandoc("\n" + inspect.getsource(kind)))
    except (OSError, TypeError, SyntaxError):
        raise VariantError(
            f"the source of {kind.__qualname__} cannot be read, so results of it could not be told from older ones",
            expected="a class in a file",
            remedy="put it into a file and name it by its import path",
        ) from None


def _counts(module: str, own: str) -> bool:
    """Whether a class's module holds code of the variant whose own module is `own`: no base that all variants share."""
    if module.startswith("tunediff."):
        return not module.endswith(".base")
    return module == own or _is_near(module, own)


def _nearby(module: str) -> Iterator[tuple[str, Path | None]]:
    """A module and, transitively, those it imports from nearby, each with its file; None where it is in no file."""
    waiting, seen = [module], set()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        path = _file(name)
        yield name, path
        if path:
            imported = _imported(ast.parse(path.read_text(encoding="utf-8")), name, path.name == "__init__.py")
            waiting += [other for other in imported if _is_near(other, module) and _file(other)]


def _imported(tree: ast.AST, module: str, is_package: bool) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = node.module or ""
            if node.level:
                up = module.split(".") if is_package else module.split(".")[:-1]
                origin = ".".join([*up[: len(up) - node.level + 1], *filter(None, [origin])])
            yield origin
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def _is_near(other: str, module: str) -> bool:
    if module.startswith("tunediff."):
        return other.rpartition(".")[0] == module.rpartition(".")[0] and not other.endswith(".base")
    if other.split(".")[0] == module.split(".")[0]:
        return True
    here, there = _file(module), _file(other)
    return "." not in module and "." not in other and bool(here and there and here.parent == there.parent)


def _file(module: str) -> Path | None:
    """The source file of a module; None for what has none, and for names that are no module."""
    found: ModuleType | None = sys.modules.get(module)
    origin = getattr(found, "__file__", None)
    if found is None:
        try:
            spec = importlib.util.find_spec(module)
        except (ImportError, AttributeError, ValueError):
            return None
        origin = spec.origin if spec else None
    return Path(origin) if origin and origin.endswith(".py") else None
