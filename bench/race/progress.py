"""What is running and how long is left: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO, TypeVar

import torch
from rich.console import Console
from rich.live import Live
from rich.text import Text

from deit.training.progress import human
from race import compiling

T = TypeVar("T")


def process_start() -> float:
    """perf_counter() as it stood when this process began, before any import; Linux knows.

    Elsewhere, now.
    """
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):
        age = 0.0
    return time.perf_counter() - age


class Progress:
    """Says on stderr what is running, how long it has run and how long is left.

    `doing` names the step, `left` sets the estimate, `say` prints a line that stays.
    """

    def __init__(self, start: float, stream: TextIO | None = None, every: float = 10.0) -> None:
        """`start`: perf_counter() when the program began; `stream`: None for stderr; `every`:
        seconds between plain lines of one and the same step."""
        self.start = start
        stream = stream or sys.stderr
        self.console = Console(file=stream, highlight=False, soft_wrap=True)
        self.live = (
            Live(
                console=self.console,
                get_renderable=self._line,
                refresh_per_second=4,
                redirect_stdout=False,  # stdout holds results, and may be a file
                transient=True,
            )
            if self.console.is_terminal
            else None
        )
        self.every = every
        self.step = ""
        self.detail = ""
        self.finish: float | None = None
        self.bound = ""
        self._printed = (0.0, "")

    def __enter__(self) -> Progress:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.step = ""
            self.live.stop()

    def elapsed(self) -> float:
        """Seconds since the program began."""
        return time.perf_counter() - self.start

    def left(self, seconds: float | None, *, at_most: bool = False) -> None:
        """The present estimate of what is left; None for unknown."""
        self.finish = None if seconds is None else time.perf_counter() + seconds
        self.bound = "at most" if at_most else "about"

    def doing(self, step: str, detail: str = "") -> None:
        """The step now running; `detail` (a round, a count) may change without a new line."""
        self.step, self.detail = step, detail
        if self.live or not step:
            return
        now = time.perf_counter()
        then, printed = self._printed
        if step != printed or now - then >= self.every:
            self._printed = (now, step)
            self.console.print(self._line())

    def say(self, message: str) -> None:
        """A line that stays."""
        if not self.live:
            message = f"[{self.elapsed():4.0f} s] {message}"
        self.console.print(Text(message))

    def announce(self, result: str) -> None:
        """A result, for stdout; beside a live line on the same terminal it is kept whole."""
        if self.live and sys.stdout.isatty():
            self.console.print(Text(result))
        else:
            print(result, flush=True)

    def _line(self) -> Text:
        if not self.step:
            return Text("")
        text = f"[{self.elapsed():4.0f} s"
        if self.finish is not None:
            text += f", {self.bound} {human(self.finish - time.perf_counter())} left"
        return Text(f"{text}] {self.step}" + (f" ({self.detail})" if self.detail else ""))


def attempt(work: Callable[[Progress], T], title: str) -> T | None:
    """What `work` returns; None, with a line that says why, where it fails or runs out of time."""
    with Progress(time.perf_counter()) as progress:
        progress.say(title)
        try:
            return work(progress)
        except compiling.OutOfTime:
            compiling.abandon()
            progress.say(f"{title}: given up, {progress.elapsed():.0f} s passed")
        except Exception as error:  # what is tried next may do better
            progress.say(f"{title}: {type(error).__name__}: {str(error)[:300]}")
        finally:
            torch._dynamo.reset()
            gc.collect()
    return None
