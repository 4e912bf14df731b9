"""The launches that ship: every operator, configuration and set of options, on meta tensors.

`aot` compiles them. Each is built by the same `plan` that a call uses, so what is compiled is
what would be launched, with the same specialisation of every argument.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from deit.kernels.triton import attention, common, configs, gelu_mlp, layer_norm, linear

ARCHITECTURES = (80, 90, 100, 120)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DIMS = (192, 384, 768, 1024)  # DeiT-Ti, -S, -B, ViT-L
_BATCH, _TOKENS = 256, 197


@dataclass(frozen=True)
class Case:
    """One kernel to compile. `arch` is a key of configs.SHARED_MEMORY, `size` D or head_dim."""

    operator: str
    variant: str
    dtype: str
    size: int
    arch: int

    @property
    def tensor_cores(self) -> bool:
        """Whether the kernel has products in half precision."""
        return self.dtype != "fp32" and "layer_norm" not in self.operator

    @property
    def tma(self) -> bool:
        """Whether it is meant to read by tensor descriptors."""
        return self.tensor_cores and self.arch in (90, 100) and self.variant not in _POINTERS

    def build(self) -> common.Launch:
        """The launch, its tensors on the meta device."""
        return _BUILDERS[self.operator](self)


# Variants whose strides a descriptor cannot take.
_POINTERS = ("unaligned", "token slice")

_VARIANTS: dict[str, tuple[str, ...]] = {
    "layer_norm": ("plain", "fp32 weights"),
    "add_layer_norm": ("plain", "gamma keep fp32"),
    "attention": ("197", "197 bias", "577", "577 bias", "unaligned"),
    "linear": ("bias", "gelu", "gelu_tanh", "residual", "residual gamma keep", "fp32 residual",
               "unaligned", "token slice"),
    "gelu_mlp": ("residual", "residual gamma keep", "fp32 residual"),
}  # fmt: skip


def all_cases(
    architectures: tuple[int, ...] = ARCHITECTURES, dtypes: tuple[str, ...] = tuple(DTYPES)
) -> Iterator[Case]:
    """Every shipped case, each configuration once."""
    for arch in architectures:
        for dtype in dtypes:
            for operator, variants in _VARIANTS.items():
                seen = set()
                for size in (64, 32, 128) if operator == "attention" else DIMS:
                    config = _config(operator, arch, DTYPES[dtype], size)
                    # LayerNorm and attention are compiled for a width, the others for a tile.
                    key = config if operator in ("linear", "gelu_mlp") else (config, size)
                    if config is None or key in seen:
                        continue
                    seen.add(key)
                    for variant in variants:
                        yield Case(operator, variant, dtype, size, arch)


def _config(operator: str, arch: int, dtype: torch.dtype, size: int) -> object:
    if operator == "linear":
        return configs.linear(arch, dtype, size, size)
    if operator == "attention":
        return configs.attention(arch, dtype, size, _TOKENS)
    return getattr(configs, operator.removeprefix("add_"))(arch, dtype, size)


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _layer_norm(case: Case) -> common.Launch:
    dtype, dim = DTYPES[case.dtype], case.size
    full = case.variant != "plain"
    weight, bias = (_empty(dim, dtype=torch.float32 if full else dtype) for _ in range(2))
    x = _empty(_BATCH, _TOKENS, dim, dtype=dtype)
    config = configs.layer_norm(case.arch, dtype, dim)
    if case.operator == "layer_norm":
        return _launch(layer_norm.plan_layer_norm(x, weight, bias, 1e-6, config=config))
    residual = _empty(*x.shape, dtype=torch.float32 if full else dtype)
    gamma, keep = (_empty(dim), _empty(_BATCH)) if full else (None, None)
    return _launch(
        layer_norm.plan_add_layer_norm(x, residual, weight, bias, 1e-6, gamma, keep, config=config)
    )


def _attention(case: Case) -> common.Launch:
    dtype, heads = DTYPES[case.dtype], 12
    tokens = 577 if "577" in case.variant else _TOKENS
    # One spare element a token takes the strides off 16 bytes.
    spare = 1 if "unaligned" in case.variant else 0
    qkv = _empty(_BATCH, tokens, 3 * heads * case.size + spare, dtype=dtype)
    key_bias = _empty(_BATCH, tokens) if "bias" in case.variant else None
    config = configs.attention(case.arch, dtype, case.size, tokens, tma=not spare)
    qkv = qkv[..., : 3 * heads * case.size]
    return _launch(attention.plan(qkv, heads, 0.125, key_bias, config=config))


def _epilogue(case: Case, shape: torch.Size) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    residual = gamma = keep = None
    if "residual" in case.variant:
        fp32 = "fp32" in case.variant
        residual = _empty(*shape, dtype=torch.float32 if fp32 else DTYPES[case.dtype])
    if "gamma" in case.variant:
        gamma, keep = _empty(shape[-1]), _empty(shape[0])
    return residual, gamma, keep


def _linear(case: Case) -> common.Launch:
    dtype, dim = DTYPES[case.dtype], case.size
    x = _empty(_BATCH, _TOKENS, dim, dtype=dtype)
    if case.variant == "unaligned":
        x = _empty(_BATCH, _TOKENS, dim + 1, dtype=dtype)[..., :dim]
    elif case.variant == "token slice":
        x = _empty(_BATCH, _TOKENS + 1, dim, dtype=dtype)[:, 1:]
    weight, bias = _empty(dim, dim, dtype=dtype), _empty(dim, dtype=dtype)
    activation = case.variant if case.variant.startswith("gelu") else None
    config = configs.linear(case.arch, dtype, dim, dim)
    return _launch(
        linear.plan(x, weight, bias, activation, *_epilogue(case, x.shape), config=config)
    )


def _gelu_mlp(case: Case) -> common.Launch:
    dtype, dim = DTYPES[case.dtype], case.size
    x = _empty(_BATCH, _TOKENS, dim, dtype=dtype)
    w1, b1 = _empty(4 * dim, dim, dtype=dtype), _empty(4 * dim, dtype=dtype)
    w2, b2 = _empty(dim, 4 * dim, dtype=dtype), _empty(dim, dtype=dtype)
    config = configs.gelu_mlp(case.arch, dtype, dim)
    assert config is not None  # all_cases leaves these out
    return _launch(gelu_mlp.plan(x, w1, b1, w2, b2, *_epilogue(case, x.shape), config=config))


def _launch(planned: tuple[object, common.Launch | None] | None) -> common.Launch:
    assert planned is not None
    assert planned[1] is not None  # no case is empty
    return planned[1]


_BUILDERS = {
    "layer_norm": _layer_norm,
    "add_layer_norm": _layer_norm,
    "attention": _attention,
    "linear": _linear,
    "gelu_mlp": _gelu_mlp,
}
