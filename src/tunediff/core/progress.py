"""Progress on stderr: what is done, how fast, and how long it will still take."""

from __future__ import annotations

import sys
import time


class Progress:
    """Called with (stage, done, total). On a terminal one line is rewritten; elsewhere a line every ten seconds."""

    def __init__(self, stream=None, enabled: bool = True):
        self.stream, self.enabled = stream or sys.stderr, enabled
        self.stage, self.began, self.told = "", 0.0, 0.0
        self.first, self.over = 0, False

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if stage != self.stage:
            self.close()
            self.stage, self.began, self.told, self.first, self.over = stage, now, 0.0, done, False
        live = self.stream.isatty() if hasattr(self.stream, "isatty") else False
        if not self.enabled or self.over or (now - self.told < (0.2 if live else 10) and done < total):
            return
        self.told, self.over = now, done >= total
        elapsed = now - self.began
        rate = (done - self.first) / elapsed if elapsed > 0.5 else 0.0
        left = (
            f"{rate:,.0f}/s  {max(0.0, (total - done) / rate):.0f} s left"
            if rate and done < total
            else f"{elapsed:.0f} s"
        )
        line = f"{stage:<22} {done:>9,} / {total:,}  {left}"
        self.stream.write(f"\r\x1b[K{line}" if live else line + "\n")
        self.stream.flush()

    def close(self) -> None:
        """End the line in progress."""
        if self.stage and self.enabled and getattr(self.stream, "isatty", lambda: False)():
            self.stream.write("\n")
        self.stage = ""
