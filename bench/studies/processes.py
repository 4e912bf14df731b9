"""Several processes beside each other on a CPU: the same images, the same threads, shared out.

One process with all threads, two with half of them each, and so on. In inference each works for
itself; in training all are one DistributedDataParallel over gloo. The workers of every point stay
alive and wait without a thread running, so that all points share the rounds. A sample is the time
from asking the workers of a point to the last one's answer.
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed
import torch.multiprocessing
from torch.nn.parallel import DistributedDataParallel

from evidence.timing import interleave, spread
from race import checks, planning, tables
from race import contenders as field_of
from race.contenders import Contender, Network
from race.inputs import Inputs

Row = dict[str, Any]
CONTENDERS = ("fused", "eager")
CPU = torch.device("cpu")
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
            # Not `send`: Python 3.12.1 crashes in collecting what that leaves of a broken pipe.
            pipe.send_bytes(what.encode())
        answers = [pipe.recv_bytes().decode() for pipe in self.pipes]
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


def sweep(
    network: Network, asked: Sequence[int], batch: int, seconds: float, train: bool = False
) -> list[Row]:
    """A row a point and contender, with the samples of the same rounds.

    seconds: of timed calls for each, as far as 7 rounds allow. train: steps with AdamW, their
    gradients averaged over the processes, in place of inference. Raises RuntimeError where a worker
    fails, ValueError as `check`.
    """
    threads = torch.get_num_threads()
    check(asked, threads, batch)
    with contextlib.ExitStack() as stack:
        pools = {
            n: stack.enter_context(_workers(network, n, threads // n, batch // n, train))
            for n in asked
        }
        runs = [(n, name) for n in asked for name in CONTENDERS]
        steps = [lambda _, n=n, name=name: pools[n].ask(name) for n, name in runs]
        plan = planning.plan_rounds([step(0) for step in steps], seconds)

        def refresh(_: int) -> None:
            for pool in pools.values():
                pool.ask(REFRESH)

        samples = interleave(steps, plan.rounds, before=refresh)
    name = "ddp" if train else "processes"
    work = network.flops * (tables.TRAINING_FLOPS if train else 1) / 1e9
    return [
        _row(network, n, how, batch, taken) | {"sweep": name, "gflop_per_image": work,
            "gflop_per_s": work * batch / statistics.median(taken)}
        for (n, how), taken in zip(runs, samples, strict=True)
    ]  # fmt: skip


def _row(network: Network, n: int, how: str, batch: int, samples: list[float]) -> Row:
    speed = spread([batch / taken for taken in samples])
    return {
        "network": network.label, "contender": how, "x": n, "batch": batch, "n": speed.n,
        "img_per_s": speed.median, "img_per_s_low": speed.low, "img_per_s_high": speed.high,
        "memory_bytes": None, "seconds": samples,
    }  # fmt: skip


@contextlib.contextmanager
def _workers(
    network: Network, count: int, threads: int, images: int, train: bool
) -> Iterator[Pool]:
    """`count` processes, ready to run; stopped at the end, whatever happened."""
    context = torch.multiprocessing.get_context("spawn")
    ends = [context.Pipe() for _ in range(count)]
    with tempfile.TemporaryDirectory() as folder:
        meeting = f"file://{folder}/meeting" if train else None
        running = [
            context.Process(
                target=_work, args=(theirs, network, threads, images, meeting, rank, count),
                daemon=True,
            )
            for rank, (_, theirs) in enumerate(ends)
        ]  # fmt: skip
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
                    pipe.send_bytes(STOP.encode())
            for process in running:
                process.join(10)
                process.kill()


def _work(
    pipe: Connection, network: Network, threads: int, images: int,
    meeting: str | None, rank: int, count: int,
) -> None:  # fmt: skip
    """A worker: answers "" to what it has done, or what went wrong.

    meeting: where those who train together find each other; None for inference.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(0)  # the same weights in every worker
    train = meeting is not None
    if train:
        torch.distributed.init_process_group(
            "gloo", init_method=meeting, rank=rank, world_size=count
        )
    base = field_of.eager(network, CPU, torch.float32, train)
    entries = {"eager": base, "fused": field_of.fused(base, "auto", train)}
    torch.manual_seed(1 + rank)  # other images
    inputs = Inputs(CPU, torch.float32)
    wrong = _why_wrong(entries["fused"], base, inputs.get(base, images), train)
    if train and count > 1:
        for each in entries.values():
            each.call = DistributedDataParallel(each.module)
    steps = {name: field_of.make_step(each, torch.float32, train) for name, each in entries.items()}
    while (what := pipe.recv_bytes().decode()) != STOP:
        if what == REFRESH:
            inputs.refresh(0)
        else:
            steps[what](inputs.get(base, images))
        pipe.send_bytes(wrong.encode())
    if train:
        torch.distributed.destroy_process_group()


def _why_wrong(fused: Contender, base: Contender, images: torch.Tensor, train: bool) -> str:
    """What tells the fused network's logits or gradients from eager's; "" where nothing does."""
    try:
        if train:
            checks.verify_gradients(fused, base, images, torch.float32)
        else:
            with torch.inference_mode():
                checks.Oracle(base, images).verify(fused, fused.call(images))
    except checks.WrongOutputs as error:
        return str(error)
    return ""
