"""How fast a run goes, and whether the network or the loader is the limit."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from deit.data.loader import Batch


@dataclass
class Pace:
    """Sums since the last line of the display, of this process; one instance a line."""

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
        self.loss, self.updates, self.waited = (
            self.loss + loss,
            self.updates + 1,
            self.waited + waited,
        )
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
