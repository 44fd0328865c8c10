"""Check types: run mypy, and fail if a file has more errors than `tools/type_errors.json` allows.

Rooms in `STRICT` may have no errors. When a file has fewer errors than allowed, the allowed number is lowered in place;
this script never raises a number. After a file was moved or renamed, ``--reset`` counts all errors again.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ALLOWED = ROOT / "tools" / "type_errors.json"
"""File with the number of errors that each file may have."""
STRICT = ("core", "records", "kernels", "dictionaries")
"""Rooms in which no type error is allowed."""
ERROR = re.compile(r"^(?P<path>[^:]+\.py):\d+(:\d+)?: error: ")


def compare(errors: list[str], allowed: dict[str, int]) -> tuple[list[str], dict[str, int]]:
    """Lines to fail with, and the allowed number of errors by file from now on, never higher than before."""
    lines: dict[str, list[str]] = {}
    for line in errors:
        if match := ERROR.match(line):
            lines.setdefault(Path(match["path"]).as_posix(), []).append(line)
    faults = []
    for path, found in lines.items():
        limit = 0 if is_strict(path) else allowed.get(path, 0)
        if len(found) > limit:
            faults += [*found, f"{path}: {len(found)} errors, {limit} allowed"]
    lowered = {path: min(limit, len(lines.get(path, []))) for path, limit in allowed.items()}
    return faults, {path: limit for path, limit in lowered.items() if limit}


def is_strict(path: str) -> bool:
    """Whether a file is in a room in which no type error is allowed."""
    return any(path.startswith(f"src/tunediff/{room}/") for room in STRICT)


def main() -> int:
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--no-error-summary", "--no-pretty", "--hide-error-context"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    errors = done.stdout.splitlines()
    if done.returncode not in (0, 1) or done.stderr.strip():  # mypy itself failed
        print(done.stdout + done.stderr, file=sys.stderr)
        return 2
    if "--reset" in sys.argv:
        counts = Counter(match["path"] for line in errors if (match := ERROR.match(line)))
        allowed = {path: count for path, count in counts.items() if not is_strict(path)}
    else:
        allowed = json.loads(ALLOWED.read_text(encoding="utf-8"))
    faults, lowered = compare(errors, allowed)
    text = json.dumps(lowered, indent=1, sort_keys=True) + "\n"
    if not ALLOWED.is_file() or text != ALLOWED.read_text(encoding="utf-8"):
        ALLOWED.write_text(text, encoding="utf-8")
        print(f"{ALLOWED.relative_to(ROOT)} lowered: commit it with the change")
    print("\n".join(faults) or f"types: no new error ({sum(lowered.values())} left outside {', '.join(STRICT)})")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
