"""Another process that keeps one of this process's cores busy."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator

# It ends with its parent, however that ends.
_BUSY = """
import os
os.sched_setaffinity(0, {core})
parent = os.getppid()
while os.getppid() == parent:
    for _ in range(1000000):
        pass
"""


def core() -> int:
    """The last core that this process may use.

    Raises ValueError where that is its only one, or where it cannot ask (Linux only).
    """
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    if len(cores) < 2:
        raise ValueError(f"neighbour: expected two cores or more, on Linux; got {len(cores)}")
    return max(cores)


@contextlib.contextmanager
def busy_core() -> Iterator[subprocess.Popen[bytes]]:
    """A process of this one's priority, which computes on `core()` meanwhile."""
    program = _BUSY.format(core={core()})
    with subprocess.Popen([sys.executable, "-c", program]) as process:
        try:
            yield process
        finally:
            process.kill()
