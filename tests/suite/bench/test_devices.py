"""The device that is measured: its name among namesakes, its memory and its peak."""

from __future__ import annotations

import pytest
import torch

from deit import info
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


def cpuinfo(family: int, model: int, flags: str) -> str:
    one = f"vendor_id\t: AuthenticAMD\ncpu family\t: {family}\nmodel\t\t: {model}\n"
    one += f"model name\t: AMD EPYC\nstepping\t: 1\nflags\t\t: fpu sse2 {flags}\n\n"
    return f"processor\t: 0\n{one}processor\t: 1\n{one}"


AVX512 = "avx2 fma f16c avx512f avx512bw avx512dq avx512vl avx512_vnni avx512_bf16"
NAMESAKES = [  # three generations, a model of one, and one whose host hides what it has
    cpuinfo(26, 2, AVX512),
    cpuinfo(25, 17, AVX512),
    cpuinfo(25, 1, "avx2 fma f16c"),
    cpuinfo(25, 1, AVX512),
    cpuinfo(25, 1, "avx2 fma f16c avx512f"),
    cpuinfo(25, 1, ""),
]


def test_processors_of_one_name_are_two_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for text in NAMESAKES:
        told = info.processor(text)
        monkeypatch.setattr(info, "processor", lambda told=told: told)
        found.append(devices.describe(CPU))
        monkeypatch.undo()
    assert {facts["cpu"] for facts in found} == {"AMD EPYC"}
    assert found[0]["device"] == "AMD EPYC (family 26, model 2, AVX512, VNNI, BF16)"
    assert devices.slug(found[0]) == "cpu-amd-epyc-family-26-model-2-avx512-vnni-bf16"
    assert len({facts["device"] for facts in found}) == len(found)
    assert len({devices.slug(facts) for facts in found}) == len(found)
    assert found[1]["processor"] == {
        "vendor": "AMD", "family": 25, "model_number": 17, "instruction_sets": AVX512,
    }  # fmt: skip


def test_what_is_not_told_of_a_processor_is_not_made_up() -> None:
    arm = (
        "processor\t: 0\nFeatures\t: fp asimd asimddp sve i8mm bf16\nCPU implementer\t: 0x41\n"
        "CPU architecture: 8\nCPU variant\t: 0x1\nCPU part\t: 0xd40\n"
    )
    told = info.processor(arm)
    assert (told["vendor"], told["family"], told["model_number"]) == ("Arm", 0xD40, 1)
    label = info.processor_label(told)
    assert label.endswith("(Arm, family 3392, model 1, NEON, DOTPROD, BF16, I8MM, SVE)")
    nothing = info.processor("")
    assert nothing["vendor"] is nothing["family"] is nothing["model_number"] is None
    assert info.processor_label(nothing) == nothing["model"]
    assert info.processor_label(nothing | {"model": "Apple M1"}) == "Apple M1"
