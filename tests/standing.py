"""A machine that nobody has measured, and measurements that were never made."""

from __future__ import annotations

import contextlib

import pytest
import torch

from deit.fused_vit import whole_models
from deit.fused_vit.racing import Lap
from deit.kernels.engine import cache_files, device_key, verdicts
from deit.kernels.engine.verdicts import Timed, Verdict

CPU = torch.device("cpu")
UNKNOWN = "Acme family 2 model 7, AVX2"


@contextlib.contextmanager
def unknown_machine(folder, measure="auto"):
    """Nothing is shipped for it, and its cache, in `folder`, is empty."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        patch.setenv(device_key.PRETENDED, UNKNOWN)
        patch.setenv("FUSED_DEIT_MEASURE", measure)
        forget()
        yield patch
    forget()


def forget():
    """As another process begins."""
    verdicts.forget()
    whole_models.forget()


def found(problem, winner="cpu"):
    """As if `winner` had been found for a problem."""
    key, order = device_key.device_key(CPU), () if winner == "reference" else (winner,)
    timed = {name: Timed(10.0, 2.0, 1.9, 2.1, 0.5) for name in ("reference", *order)}
    versions = device_key.versions("cpu")
    return Verdict(problem, winner, timed, cache_files.now(), str(key), versions, order)


def stand_in(monkeypatch, measuring, winner="cpu"):
    """`measure` finds `winner` for whatever it is asked; returns what it was asked, by calls."""
    asked = []

    def measure(problems, device, *, budget, report):
        asked.append(list(problems))
        made = [found(problem, winner) for problem in problems]
        verdicts.store(device_key.device_key(device), made)
        return made

    monkeypatch.setattr(measuring.operators, "measure", measure)
    return asked


def outcome(speed, own=None, network="DeiT, inference"):
    """As if a network had been raced: `speed` times as fast fused, 8 bits `own` times as its own
    dtype."""
    laps = (Lap(whole_models.WAS, 10.0), Lap(whole_models.FUSED, 10.0 / speed, speed, *[speed] * 2))
    key, versions = device_key.device_key(CPU), device_key.versions("cpu")
    beside = None if own is None else Lap(whole_models.FUSED, 1.0, own, own * 0.98, own * 1.01)
    return whole_models.Outcome(network, laps, cache_files.now(), str(key), versions, beside)
