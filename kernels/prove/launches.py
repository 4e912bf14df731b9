"""The launches that ship: every kernel, configuration and set of options, on meta tensors.

`aot` compiles them. Each is built by the same `plan` that a call uses, so what is compiled is
what would be launched, with the same specialisation of every argument. An operator's launches.py
says which it has.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from deit.kernels.device import common
from deit.kernels.prove import calls

ARCHITECTURES = (80, 90, 100, 120)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DIMS = (192, 384, 768, 1024)  # DeiT-Ti, -S, -B, ViT-L
TOKENS = 197


@dataclass(frozen=True)
class Kernel:
    """What of a kernel ships.

    config: (architecture, dtype, size) -> what, beside the size, it is compiled for; None for no
        kernel. build: the launch, its tensors on the meta device. sizes: D, or what stands for it.
    tiled: it is compiled for a tile and not for a width.
    products: it has products in half precision, except in the variants `without`.
    eight_bits: its products are in 8 bits, whatever its dtype.
    descriptors: it is meant to read by tensor descriptors at the sizes `described` (all, if empty),
        except in variants with one of the words `pointers`.
    """

    variants: tuple[str, ...]
    config: Callable[[int, torch.dtype, int], object]
    build: Callable[[Shipped], common.Launch]
    sizes: tuple[int, ...] = DIMS
    tiled: bool = False
    products: bool = True
    without: tuple[str, ...] = ()
    eight_bits: bool = False
    descriptors: bool = True
    described: tuple[int, ...] = ()
    pointers: tuple[str, ...] = ("unaligned", "token slice")


@dataclass(frozen=True)
class Shipped:
    """One launch. `arch` is a key of chips.CHIPS, `size` D or head_dim or the number of classes.

    batch: how many images. They are on the meta device, so any number of them costs nothing.
    """

    operator: str
    variant: str
    dtype: str
    size: int
    arch: int
    batch: int = 256

    @property
    def kernel(self) -> Kernel:
        """What its operator says of the kernel."""
        return kernels()[self.operator]

    @property
    def tensor_cores(self) -> bool:
        """Whether the kernel has products in half precision."""
        kernel = self.kernel
        if not kernel.products or self.variant in kernel.without:
            return False
        return kernel.eight_bits or self.dtype != "fp32"

    @property
    def tma(self) -> bool:
        """Whether it is meant to read by tensor descriptors."""
        kernel = self.kernel
        if self.arch not in (90, 100) or not kernel.descriptors:
            return False
        if self.size not in (kernel.described or (self.size,)):
            return False
        return self.tensor_cores and not any(word in self.variant for word in kernel.pointers)

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype`, as PyTorch's."""
        return DTYPES[self.dtype]

    def build(self) -> common.Launch:
        """The launch, its tensors on the meta device."""
        return self.kernel.build(self)


@functools.cache
def modules() -> tuple[ModuleType, ...]:
    """The launches.py of every operator that has kernels, in the order of `calls.folders`."""
    names = [f"{folder}.launches" for folder in (*calls.folders(), "deit.kernels.device")]
    return tuple(importlib.import_module(n) for n in names if importlib.util.find_spec(n))


@functools.cache
def kernels() -> dict[str, Kernel]:
    """By name."""
    return {name: kernel for module in modules() for name, kernel in module.KERNELS.items()}


def shipped(
    architectures: tuple[int, ...] = ARCHITECTURES, dtypes: tuple[str, ...] = tuple(DTYPES)
) -> Iterator[Shipped]:
    """Everything that ships, each configuration once."""
    for arch in architectures:
        for dtype in dtypes:
            for name, kernel in kernels().items():
                seen = set()
                for size in kernel.sizes:
                    config = kernel.config(arch, DTYPES[dtype], size)
                    key = config if kernel.tiled else (config, size)
                    if config is None or key in seen:
                        continue
                    seen.add(key)
                    for variant in kernel.variants:
                        yield Shipped(name, variant, dtype, size, arch)


def square(factory: Callable[..., object]) -> Callable[[int, torch.dtype, int], object]:
    """A factory of width and depth, asked for both of the same size."""
    return lambda arch, dtype, size: factory(arch, dtype, size, size)


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor on the meta device."""
    return torch.empty(shape, dtype=dtype, device="meta")


def epilogue(
    shipped: Shipped, shape: torch.Size
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The residual, gamma and keep that a variant's words name."""
    residual = gamma = keep = None
    if "residual" in shipped.variant:
        dtype = torch.float32 if "fp32" in shipped.variant else shipped.torch_dtype
        residual = empty(*shape, dtype=dtype)
    if "gamma" in shipped.variant:
        gamma, keep = empty(shape[-1]), empty(shape[0])
    return residual, gamma, keep


def first(
    planned: tuple[object, common.Launch | Sequence[common.Launch] | None] | None,
) -> common.Launch:
    """The first launch of a plan; what ships is not empty."""
    assert planned is not None
    found = planned[1]
    assert found
    return found[0] if isinstance(found, Sequence) else found
