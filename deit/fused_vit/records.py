"""All that was measured on a device, as other processes and a run's folder keep it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from deit.fused_vit import whole_models
from deit.fused_vit.whole_models import Outcome
from deit.kernels.engine import device_key, verdicts
from deit.kernels.engine.json_files import Fields


def record(device: torch.device) -> dict[str, Any]:
    """All that was measured on a device and stands in this process, as JSON."""
    key = str(device_key.device_key(device))
    here = [one for one in verdicts.in_force(device) if one.device == key]
    networks = {name: one.plain() for name, one in whole_models.known(device).items()}
    return {"device": key, "verdicts": [one.plain() for one in here], "networks": networks}


def why_not(found: dict[str, Any], device: torch.device, name: str) -> str:
    """Why what `record` gave does not speak for a device now; "" where it does.

    Raises ValueError, which begins with `name`, for what is no record.
    """
    fields, key = Fields(found, name), device_key.device_key(device)
    if fields.text("device") != str(key):
        return f"{name} is of {fields.text('device')}, this is {key}"
    outcomes = revived(fields.fields("networks").values, name).values()
    measured = verdicts.revive_all(fields.array("verdicts", dict, "verdicts"), name)
    now = device_key.versions(key.kind)
    found_with = [dict(one.versions) for one in measured] + [one.versions for one in outcomes]
    for versions in found_with:
        if versions != now:
            changed = [each for each in now if versions.get(each) != now[each]]
            return f"{name} is of another version of {' and '.join(changed) or 'something'}"
    return ""


@contextlib.contextmanager
def scoped() -> Iterator[None]:
    """What is adopted within is in force until the end; then what was before is again."""
    with verdicts.scoped(), whole_models.scoped():
        yield


def adopt(found: dict[str, Any], name: str) -> list[str]:
    """Put what `record` gave in force in this process, alone: no file of the cache counts beside.

    Returns a sentence for all that is of another device or other versions, and not used. Raises
    ValueError, which begins with `name`, for what is no record.
    """
    fields = Fields(found, name)
    whole_models.use(revived(fields.fields("networks").values, name), alone=True)
    return verdicts.use(
        verdicts.revive_all(fields.array("verdicts", dict, "verdicts"), name), alone=True
    )


def revived(outcomes: dict[str, Any], name: str) -> dict[str, Outcome]:
    """Outcomes by their names, from JSON; ValueError for what are none."""
    fields = Fields(outcomes, name, "networks")
    return {each: Outcome.revive(fields.fields(each)) for each in fields.values}
