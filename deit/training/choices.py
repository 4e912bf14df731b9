"""By which measurements a run computes: kept in its folder, so that it goes on to the same bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from deit.fused_vit import records
from deit.fused_vit.records import scoped as scoped
from deit.training.distributed import World
from deit.training.runs import VERDICTS, RunFolder


def take_up(folder: RunFolder, world: World, say: Callable[[str], None]) -> None:
    """Choose operators as the run has done until now, by what its folder keeps; a collective.

    Until `scoped` ends, nothing that was measured since counts. What is of another device or
    version is not used, and `say` is told.
    """
    found, why_not = None, ""
    if world.first:
        try:
            found = folder.verdicts()
        except (OSError, ValueError) as error:
            why_not = str(error)
    found = world.share(found)
    if found is not None:
        try:
            why_not = records.why_not(found, world.device, VERDICTS)
        except ValueError as error:
            why_not = str(error)
        if not why_not:
            records.adopt(found, VERDICTS)
    if why_not:
        say(f"{why_not}: operators are chosen anew, and the bits may be others")


def record(world: World) -> dict[str, Any]:
    """What `RunFolder.begin` keeps."""
    return records.record(world.device)
