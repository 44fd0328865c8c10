"""Progress of a long task: how it is reported, and a line on stderr that says how fast it is and how long it takes."""

from __future__ import annotations

import sys
import time
from typing import Protocol, TextIO
from weakref import WeakSet

from tunediff.core.streams import terminal
from tunediff.core.text import one_line

TERMINAL_SECONDS, LOG_SECONDS = 0.2, 10.0
"""Shortest time between two lines of one stage, on a terminal and elsewhere."""
MEASURED_SECONDS = 0.5
"""How long a stage must have run before its rate is shown."""


class Progress(Protocol):
    """Called as work goes on; `done` counts up to `total` within a stage, and a new `stage` starts anew."""

    def __call__(self, stage: str, done: int, total: int, /) -> None: ...


def quiet(stage: str, done: int, total: int) -> None:
    """The `Progress` that says nothing."""


_bars: WeakSet[ProgressBar] = WeakSet()


def tell(text: str) -> None:
    """Print a line on stderr that whoever watches should read, below the bar in progress."""
    for bar in list(_bars):
        bar.close()
    print(one_line(text), file=sys.stderr, flush=True)


class ProgressBar:
    """The `Progress` that writes to a stream: on a terminal it rewrites one line, elsewhere it adds lines seldom.

    stream    stderr by default
    enabled   False: nothing is written
    """

    def __init__(self, stream: TextIO | None = None, enabled: bool = True):
        self.stream = terminal(stream or sys.stderr)
        self.enabled, self.live = enabled, self.stream.isatty()
        _bars.add(self)
        self.stage, self.began, self.written = "", 0.0, 0.0
        self.first, self.finished = 0, False

    def __call__(self, stage: str, done: int, total: int, /) -> None:
        now = time.monotonic()
        if stage != self.stage:
            self.close()
            self.stage, self.began, self.written, self.first, self.finished = stage, now, 0.0, done, False
        pause = TERMINAL_SECONDS if self.live else LOG_SECONDS
        if not self.enabled or self.finished or (now - self.written < pause and done < total):
            return
        self.written, self.finished = now, done >= total
        line = f"{one_line(stage):<22} {done:>9,} / {total:,}  {self._pace(done, total, now - self.began)}"
        self.stream.write(f"\r\x1b[K{line}" if self.live else line + "\n")
        self.stream.flush()

    def say(self, text: str) -> None:
        """Write a line of its own, which stays."""
        if self.enabled:
            self.close()
            self.stream.write(one_line(text) + "\n")
            self.stream.flush()

    def _pace(self, done: int, total: int, elapsed: float) -> str:
        rate = (done - self.first) / elapsed if elapsed > MEASURED_SECONDS else 0.0
        if rate and done < total:
            return f"{rate:,.0f}/s  {max(0.0, (total - done) / rate):.0f} s left"
        return f"{elapsed:.0f} s"

    def close(self) -> None:
        """End the line of the stage in progress, so that other text starts on a line of its own."""
        if self.stage and self.enabled and self.live:
            self.stream.write("\n")
        self.stage = ""
