"""A race fits its batch into time and memory, and every round has images of its own."""

from __future__ import annotations

import time

import pytest
import torch
from racing import settings, tiny

from evidence import devices
from race import progress, race

CPU = torch.device("cpu")


def test_the_batch_is_shortened_with_a_reason() -> None:
    shown = progress.Progress(time.perf_counter())
    run = race.Race(settings(), shown)
    base = tiny()
    base.image_seconds = 0.25
    run.entries = [race.Entry(base.network, base, None, [base])]
    run.choose_batch()
    assert run.batch in (64, 128)
    assert f"asked for batch 256; measured at batch {run.batch}, because" in run.notes[0]
    assert "the budget is 9 min 00 s" in run.notes[0]


def test_memory_shortens_the_batch_before_anything_is_allocated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(devices, "available_bytes", lambda device: 2e9)
    run = race.Race(settings(budget=None), progress.Progress(time.perf_counter()))
    base = tiny()
    base.image_bytes = 100e6
    run.entries = [race.Entry(base.network, base, None, [base])]
    run.choose_batch()
    assert run.batch == 16
    assert "2.0 GB are free and an image takes 100 MB: batch 16" in run.notes[0]


def test_out_of_memory_while_warming_up_halves_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    run = race.Race(settings(batch=8, budget=None), progress.Progress(time.perf_counter()))
    base = tiny()

    def step(images: torch.Tensor) -> torch.Tensor:
        if len(images) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return base.module(images)

    base._step = step
    run.entries = [race.Entry(base.network, base, None, [base])]
    run.warm_up()
    assert (run.batch, base.batch) == (2, 2)
    assert run.notes == [
        "batch 8 does not fit in memory: trying 4",
        "batch 4 does not fit in memory: trying 2",
    ]


def test_inputs_are_fresh_each_round_and_in_the_contenders_format() -> None:
    inputs = race.Inputs(CPU, torch.float32)
    base = tiny()
    first = inputs.get(base, 2, 0).clone()
    inputs.refresh(0)
    again = inputs.get(base, 2, 0)
    assert not torch.equal(first, again)
    assert again.std() > 0.5
    base.layout = "channels_last"
    assert inputs.get(base, 2, 0).is_contiguous(memory_format=torch.channels_last)


def test_zeros_and_repeated_images_are_never_timed() -> None:
    """Every batch that a round times has spread, and no two rounds of it are the same."""
    run = race.Race(settings(budget=None), progress.Progress(time.perf_counter()))
    base = tiny()
    base.batch = 2
    seen: list[torch.Tensor] = []
    base._step = lambda images: seen.append(images.clone())
    run.rounds([base], 5, [2], "timing")
    assert len(seen) == 10
    assert all(0.5 < float(images.std()) < 2 for images in seen)
    assert len({float(images.double().sum()) for images in seen}) == 5  # two calls a round
