"""torch.compile within a time limit: a compilation that would overrun is interrupted, cleanly."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
import time
from collections.abc import Iterator

import torch


class OutOfTime(BaseException):
    """The time limit passed. Dynamo would catch an Exception and fall back to eager."""


@contextlib.contextmanager
def limit(seconds: float | None) -> Iterator[None]:
    """Raise OutOfTime inside the block once `seconds` have passed; None for no limit.

    SIGALRM wakes the main thread even while it waits for a C++ compiler. Where there
    is no SIGALRM (Windows) or this is not the main thread, the block runs to its end.
    """
    usable = hasattr(signal, "SIGALRM") and threading.current_thread() is threading.main_thread()
    if seconds is None or not usable:
        yield
        return

    def ring(*_: object) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, ring)
    began = time.perf_counter()
    outer, _ = signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if outer:  # a limit around this one goes on, or rings at once
            rest = outer - (time.perf_counter() - began)
            signal.setitimer(signal.ITIMER_REAL, max(rest, 1e-3))


def abandon() -> None:
    """After OutOfTime: stop the C++ compilers that the interrupted compilation left queued.

    Whatever is being compiled at this moment is waited for, so that it does not run beside what
    is timed next. Finished compilations stay: torch._dynamo.reset() would drop those too, and
    they would be compiled again inside the rounds.
    """
    from torch._inductor.async_compile import AsyncCompile

    pool = getattr(AsyncCompile, "pool", None)
    if pool is not None and pool.cache_info().currsize:
        pool().shutdown(wait=True, cancel_futures=True)
        pool.cache_clear()


def quiet_loggers() -> None:
    """Raise the level of the loggers that would tell the reader of things not asked for.

    torch.utils.cpp_extension, which inductor imports, reports an nvcc on a machine without a
    GPU; nothing here compiles for CUDA there.
    """
    if not torch.cuda.is_available():
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)


def from_cache() -> bool:
    """Did inductor take the last compilation from its cache on disk? Its time is then no guide."""
    counters = torch._dynamo.utils.counters["inductor"]
    return counters["fxgraph_cache_hit"] > 0 and counters["fxgraph_cache_miss"] == 0


def graphs() -> int:
    """How many graphs dynamo has compiled so far; more after the rounds than before is a fault."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def forget_counters() -> None:
    """Start counting cache hits anew."""
    torch._dynamo.utils.counters["inductor"].clear()
