"""Call the command line in this process or in a new one, and return what it printed."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from dataclasses import dataclass


@dataclass(frozen=True)
class Told:
    """What a command printed, and its exit code."""

    code: int
    out: str
    err: str


def cli(*arguments: object) -> Told:
    """The command in this process, as its entry point runs it."""
    from tunediff.cli.main import main

    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv, code = ["tunediff", *map(str, arguments)], 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main()
            except SystemExit as stop:
                code = stop.code or 0
    finally:
        sys.argv = before
    return Told(code, out.getvalue(), err.getvalue())


def process(
    *arguments: object, code: str = "from tunediff.cli.main import main; main()", **options
) -> subprocess.CompletedProcess:
    """The command in a process of its own; `code` is what that process runs."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=1800,  # only against a hang: a busy machine may take long
        env=environment,
        **options,
    )
