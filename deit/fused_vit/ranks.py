"""The processes of one run agree: one of them makes a thing, and the others take what it made.

They meet in the process group's key-value store and not in a collective, so a process that never
asks keeps nobody waiting.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist


class Missing(Exception):
    """Why nothing came from the process that makes it."""


def many() -> bool:
    """Whether this process is one of a group of several."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def unmet() -> str:
    """Why processes that were started together cannot agree; "" where they can or are one."""
    size = os.environ.get("WORLD_SIZE", "1")
    if many() or not size.isdecimal() or int(size) <= 1:
        return ""
    if dist.is_available() and dist.is_initialized():
        return ""  # a group of one, whatever the environment says
    return (
        f"WORLD_SIZE is {size} and no process group is initialised, so the processes could "
        "disagree: call torch.distributed.init_process_group first"
    )


def shared(name: str, make: Callable[[], dict[str, Any]], patience: float) -> dict[str, Any]:
    """What the first process to ask for `name` makes, in every process of the group that asks.

    make: what it returns goes through JSON. Called in one process alone. patience: seconds that
    the others wait for it.

    Raises:
        Missing: it raised, died or took longer. In that process: what it raised.
    """
    store = dist.distributed_c10d._get_default_store()
    place = f"fused-deit/{name}"
    if store.add(f"{place}/asked", 1) == 1:
        try:
            made = make()
        except BaseException as error:
            store.set(place, json.dumps({"error": f"{type(error).__name__}: {error}"[:300]}))
            raise
        text = json.dumps({"made": made})
        store.set(place, text)
        return json.loads(text)["made"]  # as the others get it
    try:
        store.wait([place], timedelta(seconds=patience))
        found = json.loads(store.get(place))
    except RuntimeError as error:  # torch's DistStoreError and its kin
        raise Missing(f"nothing came from it within {patience:.0f} s") from error
    if "error" in found:
        raise Missing(found["error"])
    return found["made"]
