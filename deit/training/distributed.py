"""One process or many: torchrun's environment, DDP and FSDP2, gathered states."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import init_device_mesh
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule, fully_shard

from deit import devices

# Whole tensors on the CPU of the first process: a checkpoint that any number of processes, and
# any way of sharding, can take up again.
_FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
_FROM_FIRST = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)


@dataclass(frozen=True)
class World:
    """This process among those of the run."""

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this process writes files and talks."""
        return self.rank == 0

    def sum(self, counts: Tensor) -> Tensor:
        """`counts` added up over the processes, in place."""
        if self.size > 1:
            dist.all_reduce(counts)
        return counts

    def any(self, flag: bool) -> bool:
        """Whether `flag` is up in any process; a collective."""
        if self.size == 1:
            return flag
        return bool(self.sum(torch.tensor(float(flag), device=self.device)) > 0)

    def share(self, what: Any) -> Any:
        """What the first process has, in every process; a collective."""
        if self.size == 1:
            return what
        box = [what]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def wait(self) -> None:
        """Until every process is here."""
        if self.size > 1:
            dist.barrier()


@contextmanager
def join(device: str) -> Iterator[World]:
    """Join the processes that torchrun started, if it did; leave them at the end.

    `device`: "auto" for the GPU of this process's local rank, or the CPU where there is none.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    rank, local = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
    place = devices.named(device)
    if place.type == "cuda":
        place = torch.device("cuda", local if place.index is None else place.index)
        torch.cuda.set_device(place)
    if size == 1:
        yield World(0, 1, place)
        return
    store, *_ = next(dist.rendezvous("env://"))
    dist.init_process_group(
        "nccl" if place.type == "cuda" else "gloo",
        store=meet(store, rank, size),
        rank=rank,
        world_size=size,
    )
    try:
        yield World(rank, size, place)
    finally:
        dist.destroy_process_group()


def meet(
    store: dist.Store, rank: int, size: int, patience: timedelta = timedelta(minutes=30)
) -> dist.Store:
    """The part of `store` that belongs to the `size` processes started together; waits for them.

    torchrun keeps one store over its restarts, and gloo's addresses and NCCL's identity of the
    earlier processes still stand in it. A process that comes early takes them for its peers' own,
    and is refused or waits for ever. The restart count does not tell the starts apart, since every
    node counts its own. So the first process draws a name for this start, and each of the others
    draws a question, which the first answers with that name. It answers an earlier start's
    questions too, and nobody hears.

    Raises TimeoutError, or torch's DistStoreError, where one has not come after `patience`.
    """
    drawn = uuid4().hex
    if rank > 0:
        store.set(f"question {rank}", drawn)
        store.wait([drawn], patience)
        ours = dist.PrefixStore(store.get(drawn).decode(), store)
        ours.add("arrived", 1)
        return ours
    ours, end = dist.PrefixStore(drawn, store), time.monotonic() + patience.total_seconds()
    questions = [f"question {other}" for other in range(1, size)]
    store.wait(questions, patience)
    while (arrived := ours.add("arrived", 0)) < size - 1:
        if time.monotonic() > end:
            raise TimeoutError(f"{arrived + 1} of {size} processes came within {patience}")
        for question in store.multi_get(questions):
            store.set(question.decode(), drawn)
        time.sleep(0.01)
    return ours


def shard(model: nn.Module, world: World, how: str) -> nn.Module:
    """`model` over the processes of `world` by "ddp" or "fsdp" (FSDP2: shards, in place)."""
    if how not in ("ddp", "fsdp"):
        raise ValueError(f"parallel: expected 'ddp' or 'fsdp'; got {how!r}")
    if world.size == 1:
        return model
    if how == "ddp":
        ids = [world.device.index] if world.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(model, device_ids=ids)
    mesh = init_device_mesh(world.device.type, (world.size,))
    blocks = getattr(model, "blocks", None)
    for block in blocks if isinstance(blocks, nn.Sequential) else ():
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


@contextmanager
def accumulating(model: nn.Module, last: bool) -> Iterator[None]:
    """Within: gradients are exchanged only for the `last` part of an update."""
    if isinstance(model, nn.parallel.DistributedDataParallel) and not last:
        with model.no_sync():
            yield
        return
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
    yield


def plain(model: nn.Module) -> nn.Module:
    """The network itself, out of DDP's wrapper."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def model_state(model: nn.Module) -> dict[str, Any]:
    """Whole weights by their plain names; on other processes than the first it may be empty."""
    return get_model_state_dict(plain(model), options=_FULL)


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Whole moments by the weights' names; on other processes than the first it may be empty."""
    return dict(get_optimizer_state_dict(plain(model), optimizer, options=_FULL))


def restore_model(model: nn.Module, state: dict[str, Any], world: World) -> None:
    """Fill `model` with whole weights, which the first process has read."""
    options = _FROM_FIRST if world.size > 1 else StateDictOptions(full_state_dict=True)
    set_model_state_dict(plain(model), state, options=options)


def restore_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any], world: World
) -> None:
    """Fill `optimizer` with whole moments, which the first process has read."""
    options = _FROM_FIRST if world.size > 1 else StateDictOptions(full_state_dict=True)
    set_optimizer_state_dict(plain(model), optimizer, state, options=options)
