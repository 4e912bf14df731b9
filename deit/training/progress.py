"""What a run shows while it trains: its pace, on one live line or on plain ones."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TextIO

from rich.console import Console
from rich.live import Live
from rich.text import Text

if TYPE_CHECKING:  # `human` serves programs without torch
    from deit.data.loader import Batch


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
    """One live line on a terminal, plain lines elsewhere, on stderr.

    Silent on every process but the first.
    """

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


@dataclass
class Pace:
    """How fast a run goes, and whether the network or the loader is the limit.

    Sums since the last line of the display, of this process; one instance a line.
    """

    processes: int
    workers: int
    loss: float = 0.0
    updates: int = 0
    images: int = 0
    read: int = 0
    reading: float = 0.0  # seconds of workers
    waited: float = 0.0
    since: float = field(default_factory=time.perf_counter)

    def add(self, batch: Batch) -> None:
        """One batch of this process."""
        self.images += len(batch.labels)
        self.read += len(batch.labels) + len(batch.unreadable)
        self.reading += batch.seconds

    def end(self, loss: float, waited: float) -> float:
        """One update; returns the seconds that this line covers so far."""
        self.loss += loss
        self.updates += 1
        self.waited += waited
        return time.perf_counter() - self.since

    def row(self) -> dict[str, float]:
        """The mean loss; images/s; what the loader alone could give; the share waited for it."""
        seconds = time.perf_counter() - self.since
        readers = max(1, self.workers) * self.processes
        return {
            "loss": self.loss / self.updates,
            "images_per_s": self.images * self.processes / seconds,
            "loader_images_per_s": self.read * readers / max(self.reading, 1e-9),
            "waited_percent": 100 * self.waited / seconds,
            "seconds_an_update": seconds / self.updates,
        }

    def again(self) -> Pace:
        """The next line's sums."""
        return Pace(self.processes, self.workers)
