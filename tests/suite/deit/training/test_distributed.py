"""Processes that meet in a store which others used before them, as after a restart by torchrun."""

import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch import distributed as dist

from deit.training.distributed import meet

SIZE = 3


def started(store, late=None):
    """What each of the processes gets that are started together, `late` well after the others."""

    def one(rank):
        time.sleep(0.2 if rank == late else 0)
        return meet(store, rank, SIZE, timedelta(seconds=60))

    with ThreadPoolExecutor(SIZE) as pool:
        return list(pool.map(one, range(SIZE)))


def share(parts):
    """Every process reads what each of them wrote."""
    for rank, part in enumerate(parts):
        part.set(f"address {rank}", f"{id(parts)} {rank}")
    for rank in range(SIZE):
        assert {part.get(f"address {rank}") for part in parts} == {f"{id(parts)} {rank}".encode()}


@pytest.mark.parametrize("late", range(SIZE))
def test_a_restart_finds_nothing_of_the_processes_before(late):
    store = dist.HashStore()
    before = started(store)
    share(before)
    after = started(store, late)
    assert not any(part.check([f"address {rank}"]) for part in after for rank in range(SIZE))
    share(after)


@pytest.mark.parametrize("alone", range(SIZE))
def test_processes_meet_after_a_start_that_not_all_lived_through(alone):
    store = dist.HashStore()
    started(store)
    with pytest.raises((TimeoutError, dist.DistStoreError)):
        meet(store, alone, SIZE, timedelta(seconds=0.1))
    share(started(store))


def test_the_first_process_says_how_many_came():
    store = dist.HashStore()
    started(store)  # their questions are there, and nobody hears the answers
    with pytest.raises(TimeoutError, match=r"^1 of 3 processes came within 0:00:00\.1"):
        meet(store, 0, SIZE, timedelta(seconds=0.1))
