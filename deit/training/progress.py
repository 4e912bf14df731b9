"""What a run shows while it trains: one live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TextIO

from rich.console import Console
from rich.live import Live
from rich.text import Text


def human(seconds: float) -> str:
    """12 s, 3 min 20 s, 1 h 05 min, 2 d 03 h."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600:02d} h"


class Watch:
    """Prints on stderr; silent on every process but the first."""

    def __init__(self, talks: bool, stream: TextIO | None = None, every: float = 10.0) -> None:
        """`stream`: stderr if None. `every`: seconds between plain lines without a terminal."""
        self.console = Console(
            file=stream or sys.stderr, highlight=False, soft_wrap=True, quiet=not talks
        )
        self.every, self.printed, self.line = every, 0.0, ""
        self.live: Live | None = None
        if talks and self.console.is_terminal:
            self.live = Live(
                console=self.console, get_renderable=lambda: Text(self.line), transient=True
            )
            self.live.start()

    def say(self, message: str) -> None:
        """A line that stays."""
        self.console.print(Text(message))

    def update(self, line: str, *, now: bool = False) -> None:
        """What is happening; `now`: worth a plain line whatever the time."""
        self.line = line
        if self.live is None and (now or time.monotonic() - self.printed >= self.every):
            self.printed = time.monotonic()
            self.say(line)

    def close(self) -> None:
        """Take the live line away."""
        if self.live is not None:
            self.live.stop()
