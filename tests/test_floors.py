"""The house stands: imports only point down, heavy and risky ones stay in their place, no machine is named."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src"
PACKAGE = "tunediff"

DRAWING = "core | kernels records texts | models dictionaries reports | harvests | changes profiles edits | merges | runs | lab api | cli"
"""The floors, lowest first. A room imports itself and rooms of lower floors, never a sister on its own floor."""
FLOORS = [floor.split() for floor in DRAWING.split(" | ")]
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
KNOWS_HUGGING_FACE = {"models", "texts", "lab"}
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def dotted(path: Path) -> str:
    """The import name of a file under src/."""
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {dotted(path): path for path in sorted((SOURCE / PACKAGE).rglob("*.py"))}
# The package's own __init__ and __main__ only name the version and the door.
MODULES = [name for name in FILES if name not in (PACKAGE, f"{PACKAGE}.__main__")]


def imports(tree: ast.AST, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import anywhere in a file, also in functions and under TYPE_CHECKING.

    ``from a import b`` is told as ``a.b``, since b may be a module; so is `import_module` of a literal.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                up = module.split(".") if is_package else module.split(".")[:-1]
                source = ".".join([*up[: len(up) - node.level + 1], *filter(None, [source])])
            yield from ((node.lineno, f"{source}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


def imports_of(module: str) -> list[tuple[int, str]]:
    path = FILES[module]
    return list(imports(ast.parse(path.read_text(encoding="utf-8")), module, path.name == "__init__.py"))


def part(name: str) -> str:
    """The file or folder under the package that a dotted name is in; empty for the package itself."""
    return (name.split(".") + [""])[1]


def climbs(module: str, found: list[tuple[int, str]]) -> list[str]:
    """The imports of `module` that point to another room of its own floor or of a higher one."""
    room = part(module)
    return [
        f"{module}, line {line}: {room} imports {name}"
        for line, name in found
        if name.split(".")[0] == PACKAGE and part(name) != room and FLOOR_OF.get(part(name), -1) >= FLOOR_OF[room]
    ]


def test_every_module_has_a_floor():
    homeless = sorted({part(name) for name in MODULES} - set(FLOOR_OF))
    assert not homeless, f"{', '.join(homeless)} is on no floor: add it to DRAWING in tests/test_floors.py"


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module):
    if part(module) in FLOOR_OF:
        assert not climbs(module, imports_of(module))


DOOR = "tunediff.models.fast"
BEHIND_THE_DOOR = {"accelerated", "forget"}
"""All that others may import of `models.fast`, where what patches other people's networks is kept."""


def reaches_past_the_door(module: str, found: list[tuple[int, str]]) -> list[str]:
    """The imports of a module outside `models.fast` that name anything there but the door."""
    allowed = {f"{DOOR}.{name}" for name in BEHIND_THE_DOOR}
    return [
        f"{module}, line {line}: {name}"
        for line, name in found
        if (name == DOOR or name.startswith(f"{DOOR}.")) and name not in allowed
    ]


@pytest.mark.parametrize("module", [name for name in MODULES if not name.startswith(DOOR)])
def test_what_patches_networks_is_behind_one_door(module):
    assert not reaches_past_the_door(module, imports_of(module))


def test_the_door_is_narrow_and_who_passes_it_is_seen():
    assert {name for _, name in imports_of(DOOR)} == {f"{DOOR}.seam.accelerated", f"{DOOR}.weights.forget"}
    text = (
        "from tunediff.models.fast import accelerated, forget, layers\nimport tunediff.models.fast.folds\n"
        "def f():\n    from tunediff.models.fast.caches import GrowingLayer\n    from tunediff.models import fast\n"
    )
    told = reaches_past_the_door("tunediff.runs.run", list(imports(ast.parse(text), "tunediff.runs.run", False)))
    assert len(told) == 4 and all("accelerated" not in line and "forget" not in line for line in told)


def test_an_import_that_points_up_or_sideways_is_seen_wherever_it_hides():
    text = (
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from tunediff.models.pair import Pair\n"
        "def f():\n    from tunediff import dictionaries\n    import tunediff.cli.main as c\n"
        "def g():\n    from ..changes import finders\n    from tunediff.core import errors\n"
        "    import importlib; importlib.import_module('tunediff.texts.corpus')\n"
    )
    told = climbs("tunediff.records.site", list(imports(ast.parse(text), "tunediff.records.site", False)))
    names = ("models.pair", "dictionaries", "cli", "finders", "texts")
    assert len(told) == 5 and all(any(name in line for line in told) for name in names)


@pytest.mark.parametrize("module", MODULES)
def test_only_models_texts_and_the_lab_know_hugging_face(module):
    if part(module) not in KNOWS_HUGGING_FACE:
        found = [
            f"line {line}: {name}"
            for line, name in imports_of(module)
            if name.split(".")[0] in ("transformers", "peft")
        ]
        assert not found, f"{module} reaches past `models`"


@pytest.mark.parametrize("module", [PACKAGE, *MODULES])
def test_nothing_unpickles_or_runs_a_models_code(module):
    tree = ast.parse(FILES[module].read_text(encoding="utf-8"))
    assert not [name for _, name in imports_of(module) if name.split(".")[0] in PICKLES]
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            assert isinstance(node.value, ast.Constant) and node.value.value is False, f"line {node.value.lineno}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "load":
            if isinstance(node.func.value, ast.Name) and node.func.value.id == "torch":
                raise AssertionError(f"{module}, line {node.lineno}: torch.load reads pickles; use safetensors")


@pytest.mark.parametrize(
    "module", ["tunediff", "tunediff.core.variants", "tunediff.core.errors", "tunediff.records.site"]
)
def test_light_modules_stay_light(module):
    code = f"import sys, {module}; print([m for m in ('torch', 'transformers', 'peft') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


def test_no_file_names_a_machine():
    # Put together here, so that this file does not name one either.
    homes = [f"/{name}/".encode() for name in ("work", "root", "home/user", "Users")]
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    names = listed.stdout.split("\n") if listed.returncode == 0 else [str(p) for p in (ROOT / "src").rglob("*")]
    found = []
    for name in filter(None, names):
        path = ROOT / name
        if not path.is_file() or ".hypothesis" in path.parts or path.suffix in (".safetensors", ".png", ".gz"):
            continue
        data = path.read_bytes()
        found += [f"{name}: {home.decode()}" for home in homes if home in data]
    assert not found
