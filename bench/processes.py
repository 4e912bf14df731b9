"""Several processes beside each other on a CPU: the same images, the same threads, shared out.

One process with all threads, two with half of them each, and so on. The workers of every point
stay alive and wait without a thread running, so that all points share the rounds; a sample is the
time from asking the workers of a point to the last one's answer.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import checks
import planning
import torch
import torch.multiprocessing
from peers.peer import twin
from timing import interleave, spread

import deit
from deit.fused_vit import fuse
from deit.model import DeiT

Row = dict[str, Any]
CONTENDERS = ("fused", "eager")
ALLOWED = 1e-4  # of fused logits against eager's, relative L2 distance
REFRESH, STOP = "refresh", "stop"


@dataclass(frozen=True)
class Pool:
    """The workers of one point, a pipe to each; images: that they run together."""

    pipes: Sequence[Connection]
    images: int

    def ask(self, what: str) -> float:
        """Seconds until every worker has done it; RuntimeError with what one of them raised."""
        start = time.perf_counter()
        for pipe in self.pipes:
            pipe.send(what)
        answers = [pipe.recv() for pipe in self.pipes]
        taken = time.perf_counter() - start
        for answer in answers:
            if answer:
                raise RuntimeError(answer)
        return taken


def points(threads: int, batch: int) -> tuple[int, ...]:
    """1, 2, 4, ... processes: as many as share out both the threads and the images evenly."""
    found = [1]
    while threads % (2 * found[-1]) == 0 and batch % (2 * found[-1]) == 0:
        found.append(2 * found[-1])
    return tuple(found)


def check(asked: Sequence[int], threads: int, batch: int) -> None:
    """Raises ValueError for numbers of processes that do not share out threads and images."""
    for count in asked:
        if count < 1 or threads % count or batch % count:
            raise ValueError(
                f"points: expected processes that divide {threads} threads and {batch} images; "
                f"got {count}"
            )


def sweep(config: deit.Config, asked: Sequence[int], batch: int, seconds: float) -> list[Row]:
    """A row a point and contender, with the samples of the same rounds.

    seconds: of timed calls for each, as far as 7 rounds allow. Raises RuntimeError where a worker
    fails, ValueError as `check`.
    """
    threads = torch.get_num_threads()
    check(asked, threads, batch)
    with contextlib.ExitStack() as stack:
        pools = {
            n: stack.enter_context(_workers(config, n, threads // n, batch // n)) for n in asked
        }
        runs = [(n, name) for n in asked for name in CONTENDERS]
        steps = [lambda _, n=n, name=name: pools[n].ask(name) for n, name in runs]
        plan = planning.plan_rounds([step(0) for step in steps], seconds)

        def refresh(_: int) -> None:
            for pool in pools.values():
                pool.ask(REFRESH)

        samples = interleave(steps, plan.rounds, before=refresh)
    return [
        _row(config, n, name, batch, taken) for (n, name), taken in zip(runs, samples, strict=True)
    ]


def _row(config: deit.Config, n: int, name: str, batch: int, samples: list[float]) -> Row:
    speed = spread([batch / taken for taken in samples])
    work = config.flops / 1e9
    return {
        "sweep": "processes", "network": config.label, "contender": name, "x": n, "batch": batch,
        "n": speed.n, "img_per_s": speed.median, "img_per_s_low": speed.low,
        "img_per_s_high": speed.high, "gflop_per_image": work,
        "gflop_per_s": work * batch / statistics.median(samples), "memory_bytes": None,
        "seconds": samples,
    }  # fmt: skip


@contextlib.contextmanager
def _workers(config: deit.Config, count: int, threads: int, images: int) -> Iterator[Pool]:
    """`count` processes, ready to run; stopped at the end, whatever happened."""
    context = torch.multiprocessing.get_context("spawn")
    ends = [context.Pipe() for _ in range(count)]
    running = [
        context.Process(target=_work, args=(theirs, config, threads, images), daemon=True)
        for _, theirs in ends
    ]
    for process, (_, theirs) in zip(running, ends, strict=True):
        process.start()
        theirs.close()  # its end is the worker's alone: a worker that dies closes it
    pool = Pool([ours for ours, _ in ends], count * images)
    try:
        pool.ask(REFRESH)
        yield pool
    except (EOFError, ConnectionError) as error:
        raise RuntimeError("a worker ended before it answered") from error
    finally:
        for pipe in pool.pipes:
            with contextlib.suppress(OSError):
                pipe.send(STOP)
        for process in running:
            process.join(10)
            process.kill()


def _work(pipe: Connection, config: deit.Config, threads: int, images: int) -> None:
    """A worker: answers "" to what it has done, or what went wrong."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    eager = DeiT(config).eval()
    modules = {"eager": eager, "fused": twin(eager)}
    fuse(modules["fused"])
    batch = torch.randn(images, config.in_chans, config.img_size, config.img_size)
    wrong = ""
    with torch.inference_mode():
        error = checks.distance(modules["fused"](batch), modules["eager"](batch))
        if not error <= ALLOWED:
            wrong = f"the fused logits are off by {error:.1e} (relative) from eager's"
        while (what := pipe.recv()) != STOP:
            if what == REFRESH:
                batch.normal_()
            else:
                modules[what](batch)
            pipe.send(wrong)
