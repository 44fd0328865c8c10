"""Every remedy can be typed or done as it stands: those in the source, and those of errors that are provoked."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import tunediff
from tunediff.core.errors import TunediffError
from tunediff.runs.plan import Plan

SOURCE = Path(tunediff.__file__).parent
ROOT = Path(__file__).resolve().parents[2]
VALUE = "…"
"""What stands for a part of a remedy that is known only when it is told."""
ACTIONS = set(
    "add ask check choose connect convert cut delete download free get give install leave lower make mend merge name pick"
    " put quote raise record remove rename run save split take unpack use wait write".split()
)
"""First words of remedies that a person carries out."""
SETTING = re.compile(r"--set '?([\w.:]+)=('[^']*'|[^\s,)]*)")


def strings(node: ast.AST, constants: dict[str, ast.AST]) -> Iterator[str]:
    """Every text that an expression may be, with `VALUE` for what is not in the source."""
    if isinstance(node, ast.Constant):
        yield str(node.value)
    elif isinstance(node, ast.JoinedStr):
        parts = [next(strings(p, constants)) if isinstance(p, ast.Constant) else VALUE for p in node.values]
        yield "".join(parts)
    elif isinstance(node, ast.IfExp):
        yield from strings(node.body, constants)
        yield from strings(node.orelse, constants)
    elif isinstance(node, ast.BoolOp):
        for value in node.values:
            yield from strings(value, constants)
    elif isinstance(node, ast.BinOp):
        for left in strings(node.left, constants):
            yield from (left + right for right in strings(node.right, constants))
    elif isinstance(node, ast.Name) and node.id in constants:
        yield from strings(constants[node.id], constants)
    else:
        yield VALUE


def constants(tree: ast.Module) -> Iterator[tuple[str, ast.AST]]:
    """The names that a module gives to values, and the values."""
    for statement in ast.walk(tree):
        if isinstance(statement, ast.Assign):
            yield from ((target.id, statement.value) for target in statement.targets if isinstance(target, ast.Name))


def remedies() -> Iterator[tuple[str, str]]:
    """Where in the source a remedy is made, and what it says."""
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(SOURCE.rglob("*.py"))}
    own = {path: dict(constants(tree)) for path, tree in trees.items()}
    shared = {name: value for found in own.values() for name, value in found.items()}
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.keyword) and node.arg == "remedy":
                for text in strings(node.value, {**shared, **own[path]}):
                    if text.strip() not in ("", VALUE):
                        yield f"{path.relative_to(SOURCE)}:{node.value.lineno}", text


def commands() -> dict[str, set[str]]:
    """The options of each command, groups' commands by both names."""
    import typer

    group = typer.main.get_command(__import__("tunediff.cli.main", fromlist=["app"]).app)
    found = {}
    for name, command in group.commands.items():
        for inner, one in {"": command, **getattr(command, "commands", {})}.items():
            options = {option for p in one.params for option in (*p.opts, *p.secondary_opts)}
            found[f"{name} {inner}".strip()] = options | {"--help"}
    return found


COMMANDS = commands()
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
PYTHON = re.compile(r"(tunediff|Fitted|model|PeftModel)\.\w+|^path=")
"""Calls that the errors of the Python verbs name."""


def faults(text: str) -> list[str]:
    """What of a remedy cannot be typed or done."""
    found = []
    for name, value in SETTING.findall(text):
        open_value = VALUE in value or VALUE in name or value.strip("'").isupper()
        try:
            if VALUE not in name:
                Plan().set(f"{name}={value.strip(chr(39))}")
        except TunediffError as error:
            if not open_value or "no setting" in error.what:
                found.append(error.what)
    for extra in re.findall(r"tunediff\[(\w+)\]", text):
        found += [] if extra in EXTRAS else [f"no extra {extra}"]
    options = set.union(*COMMANDS.values())
    for command in re.findall(r"(?:^|[ ;])tunediff ((?:organism )?[a-z]+)", text):
        found += [] if command in COMMANDS else [f"no command {command}"]
    found += [f"no option {o}" for o in re.findall(r"(?<!\S)(--?[a-z][\w-]*)", text) if o not in options]
    bare = SETTING.sub("", text)
    first = text.split()[0].strip(",;:").casefold()
    typed = text.startswith(("--", "tunediff ", "pip install ", "TUNEDIFF_DEBUG=1")) or PYTHON.search(text)
    swapped = re.fullmatch(r"\S+ in place of \S+", text)
    if not (typed or swapped or first in ACTIONS):
        found.append(f"{first!r} is nothing to do")
    if not PYTHON.search(text):
        found += [
            f"{word} is no option" for word in re.findall(r"(?<![-.\w])[a-z_]+=\S*", bare) if "TUNEDIFF" not in word
        ]
    return found


def test_every_remedy_in_the_source_can_be_typed_or_done():
    wrong = {f"{where}: {text}": found for where, text in remedies() if (found := faults(text))}
    assert not wrong, "\n".join(f"{text}\n    {', '.join(found)}" for text, found in wrong.items())
