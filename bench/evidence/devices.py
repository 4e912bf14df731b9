"""The device that is measured: its name, its own matrix-product peak, its memory."""

from __future__ import annotations

import contextlib
import ctypes
import ctypes.util
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from deit import info
from evidence.timing import Clock


def resolve(name: str) -> torch.device:
    """ "auto" (the GPU where there is one), "cpu", "cuda" or "cuda:1" as a device that exists.

    Raises ValueError for any other name, and for a GPU that torch does not see.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected auto, cpu, cuda or cuda:N; got {name!r}")
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise ValueError(f"device: torch sees {count} CUDA devices here; got {name!r}")
        device = torch.device("cuda", device.index or 0)
    return device


def versions() -> dict[str, str | None]:
    """Of what every kernel runs on; None for what is not there."""
    try:
        import triton
    except ImportError:
        triton = None
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__ if triton else None,
    }


def describe(device: torch.device) -> dict[str, Any]:
    """What a reader must know of the machine and the software to repeat a figure.

    device: what rows are told apart by; a GPU's name, or a CPU's with its family, its model and
    its instruction sets, since processors of several generations share one name.
    """
    import timm

    cpu = info.processor()
    facts: dict[str, Any] = {
        "device": info.processor_label(cpu),
        "driver": None,
        "cpu": cpu["model"],
        "processor": {
            **{name: cpu[name] for name in ("vendor", "family", "model_number")},
            "instruction_sets": " ".join(cpu["instruction_sets"]),
        },
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        **versions(),
        "timm": timm.__version__,
    }
    if device.type == "cuda":
        facts["device"] = torch.cuda.get_device_name(device)
        facts["driver"] = gpu_query(device, "driver_version")
    return facts


def slug(facts: dict[str, Any]) -> str:
    """A device in the names of files, by all of its name in `describe`.

    "cpu-amd-epyc-family-25-model-17-avx512-vnni-bf16", "nvidia-h100-80gb-hbm3".
    """
    name = re.sub(r"[^a-z0-9]+", "-", facts["device"].lower()).strip("-")
    return name if facts["driver"] else f"cpu-{name}"


def gpu_query(device: torch.device, fields: str) -> str | None:
    """nvidia-smi's answer on `fields` for this GPU; None where there is no nvidia-smi."""
    if device.type != "cuda" or not shutil.which("nvidia-smi"):
        return None
    # By UUID: nvidia-smi counts all GPUs, torch those left by CUDA_VISIBLE_DEVICES.
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    answer = subprocess.run(
        ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "-i", uuid],
        capture_output=True,
        text=True,
        check=False,
    )
    return answer.stdout.strip() if answer.returncode == 0 else None


class Peak:
    """The device's own matrix-product speed at one dtype, the best seen in this run.

    The product is square, 8192 a side on a GPU and 2048 on a CPU (where it takes 0.1 s on two
    cores and is within a few per cent of larger ones); smaller where one product would take
    more than two seconds. On a CPU it is also computed as a 1x1 convolution, which reaches
    another library: on an AMD EPYC (Zen 5, two cores) `a @ b` by MKL gave 213 GFLOP/s in fp32,
    the convolution by oneDNN 428.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.clock = Clock(device)
        self.dtype = dtype
        self.size = 8192 if device.type == "cuda" else 2048
        self.flops_per_s = 0.0
        self.by = ""

    def measure(self, seconds: float = 1.0) -> float:
        """Repeat the product for about `seconds`; returns and keeps the best FLOP/s so far."""
        if not self.flops_per_s:
            while self.size > 256 and self._best(self.size // 4, 5)[0] * 64 > 2.0:
                self.size //= 2
        end = time.perf_counter() + seconds
        while True:
            taken, by = self._best(self.size, 3)
            if 2 * self.size**3 / taken > self.flops_per_s:
                self.flops_per_s, self.by = 2 * self.size**3 / taken, by
            if time.perf_counter() > end:
                return self.flops_per_s

    def _best(self, size: int, calls: int) -> tuple[float, str]:
        """The shortest of a few products of this size, in seconds, and how it was computed."""
        a, b = (torch.randn(size, size, device=self.clock.device).to(self.dtype) for _ in range(2))
        ways: dict[str, Callable[[], torch.Tensor]] = {"matmul": lambda: a @ b}
        if self.clock.device.type == "cpu":
            pixels = a.view(1, size // 32, 32, size).permute(0, 3, 1, 2)  # channels-last
            kernel = b.view(size, size, 1, 1)
            ways["1x1 convolution"] = lambda: torch.conv2d(pixels, kernel)
        with torch.inference_mode():
            times = {
                way: min(self.clock.time(product) for _ in range(calls))
                for way, product in ways.items()
            }
        best = min(times, key=times.__getitem__)
        return times[best], best

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        return f"{self.flops_per_s / 1e9:.0f} GFLOP/s ({self.size}³, {kind}, by {self.by})"


MEMORY_IS = {
    "cuda": "the weights (in training gradients and moments too) and the most that torch's "
    "allocator held above the resting level in one step",
    "cpu": "the weights (in training gradients and moments too) and the rise of the process's "
    "resident set above the resting level in one step",
}


def available_bytes(device: torch.device) -> float:
    """Memory that can still be allocated without swapping or being killed."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(free + cached)
    found = [float("inf")]
    with contextlib.suppress(OSError):
        match = re.search(r"MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text())
        found += [int(match[1]) * 1024.0] if match else []
    with contextlib.suppress(OSError, ValueError):  # a container's own limit; "max" for none
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        found.append(float(limit - int(Path("/sys/fs/cgroup/memory.current").read_text())))
    return max(min(found), 0.0)


def step_bytes(step: Callable[[], object], device: torch.device) -> int:
    """The most memory that one call of `step` takes above the resting level, in bytes.

    On a GPU torch's allocator counts it. On Linux it is the growth of the resident set's
    high-water mark, reset through /proc/self/clear_refs, after freed memory was given back to
    the system; elsewhere the growth of ru_maxrss, a lower bound once a larger step has run.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        resting = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return max(0, torch.cuda.max_memory_allocated(device) - resting)
    _give_back_freed_memory()
    try:
        Path("/proc/self/clear_refs").write_text("5")
        resting = _status("VmRSS")
        step()
        return max(0, _status("VmHWM") - resting)
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        step()
        return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit


def _status(field: str) -> int:
    match = re.search(rf"{field}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    if match is None:
        raise OSError(f"/proc/self/status has no {field}")
    return int(match[1]) * 1024


def _give_back_freed_memory() -> None:
    """glibc keeps freed blocks resident; a step that reuses them would look free."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(ctypes.util.find_library("c")).malloc_trim(0)


def graph_pool_bytes(device: torch.device) -> int:
    """What CUDA graphs keep in pools of their own, which a step's own peak does not show."""
    if device.type != "cuda":
        return 0
    segments = torch.cuda.memory_snapshot()
    return sum(s["total_size"] for s in segments if tuple(s["segment_pool_id"]) != (0, 0))
