"""The number of type errors that a file is allowed only shrinks, and some rooms are allowed none."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
SPEC = importlib.util.spec_from_file_location("check_types", ROOT / "tools" / "check_types.py")
check_types = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(check_types)


def errors(path: str, count: int) -> list[str]:
    return [f"{path}:{line}: error: wrong  [misc]" for line in range(1, count + 1)]


def test_more_errors_than_allowed_fail_and_are_shown():
    path = "src/tunediff/lab/bench.py"
    faults, allowed = check_types.compare(errors(path, 3), {path: 2})
    assert faults[:3] == errors(path, 3) and faults[3].endswith("3 errors, 2 allowed") and allowed == {path: 2}
    assert check_types.compare(errors("src/tunediff/lab/new.py", 1), {})[0], "a new file may have none"


def test_what_was_mended_is_no_longer_allowed():
    a, b = "src/tunediff/lab/a.py", "src/tunediff/lab/b.py"
    assert check_types.compare(errors(a, 1), {a: 2, b: 5}) == ([], {a: 1})


def test_strict_rooms_are_allowed_none():
    path = "src/tunediff/core/chance.py"
    assert check_types.compare(errors(path, 1), {path: 1})[0]
    allowed = json.loads(check_types.ALLOWED.read_text(encoding="utf-8"))
    assert not [p for p in allowed if check_types.is_strict(p)]
    assert all((ROOT / p).is_file() for p in allowed), "a file has moved: python tools/check_types.py --reset"
