"""The memory and the peak of the device that is measured."""

from __future__ import annotations

import torch

from evidence import devices

CPU = torch.device("cpu")


def test_step_bytes_sees_a_temporary_allocation() -> None:
    size = 64 << 20
    seen = devices.step_bytes(lambda: torch.ones(size, dtype=torch.uint8), CPU)
    assert 0.9 * size < seen < 2 * size  # a page less here, a page more there
    assert devices.step_bytes(lambda: None, CPU) < 8 << 20


def test_peak_is_a_speed_at_the_dtype() -> None:
    peak = devices.Peak(CPU, torch.float32)
    peak.size = 256
    assert 1e8 < peak.measure(0.05) == peak.flops_per_s
    assert "(256³, float32, by " in str(peak)
