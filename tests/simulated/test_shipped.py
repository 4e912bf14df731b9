"""Every launch that ships, on the simulated GPUs: within its tensors, without a race.

The calls of test_operators.py show that results are right; these show that the forms they do not
reach stay in bounds: views off 16 bytes, slices of tokens, streams in fp32, both approximations
of GELU, ViT-L's width. Launches of one compiled kernel count once, as `make aot` compiles them.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import simulator
import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from deit.kernels.prove import aot, launches

FP8 = 89  # Ada's own configurations are those of e4m3
SLICE, KERNELS = {(90, "bf16")}, 4  # CI's part, and how many kernels of each operator


def _groups() -> list[tuple[str, int, str]]:
    found = dict.fromkeys(
        (case.operator, case.arch, case.dtype)
        for case in launches.shipped((*simulator.ARCHITECTURES, FP8))
        if case.arch != FP8 or case.operator.startswith("fp8")
    )
    return [group for group in found if simulator.ASKED == "all" or group[1:] in SLICE]


def _kernels(operator: str, arch: int, dtype: str) -> list[launches.Shipped]:
    """The first launch of each kernel, widest last."""
    cases = [c for c in launches.shipped((arch,), (dtype,)) if c.operator == operator]
    return list({aot.kernel_of(case): case for case in reversed(cases)}.values())[::-1]


class _Memory:
    """Tensors in place of those on the meta device; views of one stay views of one."""

    def __init__(self) -> None:
        self.storages: dict[int, tuple[Tensor, object]] = {}

    def __call__(self, value: object) -> object:
        if isinstance(value, TensorDescriptor):
            value.base = self(value.base)
            return value
        if not isinstance(value, Tensor):
            return value
        storage = value.untyped_storage()
        if storage._cdata not in self.storages:
            count = storage.nbytes() // value.element_size()
            generator = torch.Generator().manual_seed(len(self.storages))
            drawn = torch.randn(count, generator=generator)
            filled = drawn if value.is_floating_point() else torch.zeros(count)
            self.storages[storage._cdata] = filled.to(value.dtype), storage
        made, _ = self.storages[storage._cdata]
        return made.as_strided(value.shape, value.stride(), value.storage_offset())


def _run(case: launches.Shipped) -> None:
    """Of one image, 197 tokens: several programs, and rows that end within a tile."""
    launch = replace(case, batch=1).build()
    memory = _Memory()
    arguments = {name: memory(value) for name, value in launch.arguments.items()}
    replace(launch, arguments=arguments).run(torch.empty(0))


@pytest.mark.parametrize(("operator", "arch", "dtype"), _groups())
def test_within_bounds_and_without_races(operator, arch, dtype, note):
    cases = _kernels(operator, arch, dtype)
    if simulator.ASKED != "all":
        cases = cases[:: -(-len(cases) // KERNELS)]
    unchecked: list[str] = []
    with simulator.device(arch) as launched:
        for case in cases:
            too_large = launched.races_unchecked
            try:
                _run(case)
            except Exception as error:
                error.add_note(str(case))
                raise
            unchecked += [str(case)] * (launched.races_unchecked > too_large)
    note(what=operator, dtype=dtype, arch=arch, kernels=len(cases), launches=launched.launches,
         unchecked=len(unchecked))  # fmt: skip
    assert launched.launches >= len(cases)
    assert not unchecked
