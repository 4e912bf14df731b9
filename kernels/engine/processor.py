"""Which processor this is, by what the system tells of it: names are shared by generations."""

from __future__ import annotations

import contextlib
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# The extensions that kernels here or in PyTorch make use of, as Linux spells them.
CPU_FLAGS = (
    "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni",
    "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8", "amx_tile", "asimd", "asimddp", "bf16",
    "i8mm", "sve",
)  # fmt: skip
# Names for groups of them.
_CALLED = {
    "AVX2": ("avx2", "fma", "f16c"),
    "AVX-VNNI": ("avx_vnni",),
    "AVX512": ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl"),
    "VNNI": ("avx512_vnni",),
    "BF16": ("avx512_bf16",),
    "FP16": ("avx512_fp16",),
    "AMX": ("amx_bf16", "amx_int8", "amx_tile"),
}
_CALLED_ON_ARM = {
    "NEON": ("asimd",),
    "DOTPROD": ("asimddp",),
    "BF16": ("bf16",),
    "I8MM": ("i8mm",),
    "SVE": ("sve",),
}
_VENDORS = {"AuthenticAMD": "AMD", "GenuineIntel": "Intel", "0x41": "Arm", "0x46": "Fujitsu",
            "0x48": "HiSilicon", "0x4e": "NVIDIA", "0x51": "Qualcomm", "0x61": "Apple",
            "0x6d": "Microsoft", "0xc0": "Ampere"}  # fmt: skip


def processor(cpuinfo: str | None = None) -> dict[str, Any]:
    """The processor: model (its name), vendor, family, model_number, instruction_sets.

    Names are shared: "AMD EPYC" is what several generations call themselves. What the system
    does not tell is None, an instruction set missing. All of Arm's share an architecture's number,
    so there the family is the first core's part number, and the model its variant. cpuinfo: the
    text of /proc/cpuinfo; None for this machine's.
    """
    fields: dict[str, str] = {}
    model = platform.processor() or platform.machine() or "unknown"
    if cpuinfo is None:
        with contextlib.suppress(OSError):
            cpuinfo = Path("/proc/cpuinfo").read_text()
        if platform.system() == "Darwin":
            model = _macos_model() or model
    for line in (cpuinfo or "").splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    vendor = fields.get("vendor_id") or fields.get("CPU implementer")
    present = (fields.get("flags") or fields.get("Features") or "").split()
    return {
        "model": fields.get("model name") or model,
        "vendor": _VENDORS.get(vendor, vendor) if vendor else None,
        "family": _number(fields.get("cpu family") or fields.get("CPU part")),
        "model_number": _number(fields.get("model") or fields.get("CPU variant")),
        "instruction_sets": [flag for flag in CPU_FLAGS if flag in present],
    }


def processor_label(cpu: dict[str, Any]) -> str:
    """A processor by all that tells it from its namesakes, as `processor` has it.

    For example "AMD EPYC (family 25, model 17, AVX512, VNNI, BF16)".
    """
    sets = instruction_sets(cpu["instruction_sets"])
    parts = [f"family {cpu['family']}"] if cpu["family"] is not None else []
    parts += [f"model {cpu['model_number']}"] if cpu["model_number"] is not None else []
    vendor = cpu["vendor"] or ""
    if vendor and vendor.lower() not in cpu["model"].lower():
        parts.insert(0, vendor)
    parts += sets
    return f"{cpu['model']} ({', '.join(parts)})" if parts else str(cpu["model"])


def instruction_sets(flags: Sequence[str]) -> list[str]:
    """Linux's flags by the names of their groups: ["AVX512", "VNNI", "BF16"]."""
    present = set(flags)
    groups = [*_CALLED.items(), *_CALLED_ON_ARM.items()]
    called = {name: group for name, group in groups if present.issuperset(group)}
    if "AVX512" in called:
        called.pop("AVX2")
    # A part of a group stands for itself: a host may hide the rest.
    named = {flag for group in called.values() for flag in group}
    return [*called, *(flag for flag in flags if flag not in named)]


def _number(text: str | None) -> int | None:
    try:
        return int(text, 0) if text else None
    except ValueError:  # "CPU architecture: AArch64"
        return None


def _macos_model() -> str:
    command = ["sysctl", "-n", "machdep.cpu.brand_string"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
