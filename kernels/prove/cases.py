"""The launches that ship: every operator, configuration and set of options, on meta tensors.

`aot` compiles them. Each is built by the same `plan` that a call uses, so what is compiled is
what would be launched, with the same specialisation of every argument.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from deit.kernels.attention import triton as attention
from deit.kernels.attention import triton_bwd as attention_bwd
from deit.kernels.device import common, configs
from deit.kernels.gelu_mlp import triton as gelu_mlp
from deit.kernels.linear import triton as linear
from deit.kernels.linear import triton_bwd as linear_bwd
from deit.kernels.linear import triton_gradients as products
from deit.kernels.prove import cases_block, cases_fp8, cases_rows

ARCHITECTURES = (80, 90, 100, 120)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DIMS = (192, 384, 768, 1024)  # DeiT-Ti, -S, -B, ViT-L
HEAD_DIMS = (64, 32, 128, 80, 96)
_TOKENS = 197


@dataclass(frozen=True)
class Case:
    """One kernel to compile. `arch` is a key of configs.SHARED_MEMORY, `size` D or head_dim.

    batch: how many images. They are on the meta device, so any number of them costs nothing.
    """

    operator: str
    variant: str
    dtype: str
    size: int
    arch: int
    batch: int = 256

    @property
    def tensor_cores(self) -> bool:
        """Whether the kernel has products in half precision."""
        if self.operator in cases_rows.VARIANTS and self.operator not in cases_rows.PRODUCTS:
            return False
        if self.variant in ("delta", "tokens") or self.operator == "row_stats":
            return False
        if self.operator in ("output_gradient", "fp8_rows"):  # products' work without the products
            return False
        if self.operator == "fp8_product":
            return True
        return self.dtype != "fp32"

    @property
    def tma(self) -> bool:
        """Whether it is meant to read by tensor descriptors."""
        if self.operator == "fp8_product":
            return self.arch in (90, 100)
        if self.arch not in (90, 100) or any(pointers in self.variant for pointers in _POINTERS):
            return False
        if self.operator in cases_rows.VARIANTS:
            return False
        if self.operator.startswith("attention") and self.size not in configs.TMA_HEAD_DIMS:
            return False
        return self.tensor_cores

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype`, as PyTorch's."""
        return DTYPES[self.dtype]

    def build(self) -> common.Launch:
        """The launch, its tensors on the meta device."""
        if self.operator in cases_rows.VARIANTS:
            return cases_rows.build(self)
        return _BUILDERS[self.operator](self)


# Variants whose strides a descriptor cannot take; factors in e4m3 always suit one.
_POINTERS = ("unaligned", "token slice")
# Operators compiled for a tile and not for a width.
_TILED = ("linear", "linear_fwd", "gelu_mlp", "input_gradient", "weight_gradient",
          "output_gradient", *cases_block.TILED, *cases_fp8.TILED)  # fmt: skip

_VARIANTS: dict[str, tuple[str, ...]] = {
    "attention": ("197", "197 bias", "577", "577 bias", "unaligned"),
    "attention_fwd": ("197", "197 bias", "577 bias"),
    "attention_bwd": ("197", "197 bias", "577", "577 bias", "unaligned", "delta"),
    "linear": ("bias", "gelu", "gelu_tanh", "residual", "residual gamma keep", "fp32 residual",
               "unaligned", "token slice"),
    "gelu_mlp": ("residual", "residual gamma keep", "fp32 residual"),
    "linear_fwd": ("gelu", "gelu_tanh", "fp32 residual gamma keep",
                   "gelu unaligned"),
    # The three kernels of linear's and gelu_mlp's backward.
    "output_gradient": ("sums only", "gelu", "gelu_tanh gamma keep", "fp32 gamma keep"),
    "input_gradient": ("plain", "through gelu", "unaligned", "through gelu unaligned"),
    "weight_gradient": ("plain", "one part", "unaligned", "token slice"),
    **cases_block.VARIANTS,
    **cases_fp8.VARIANTS,
}  # fmt: skip


def all_cases(
    architectures: tuple[int, ...] = ARCHITECTURES, dtypes: tuple[str, ...] = tuple(DTYPES)
) -> Iterator[Case]:
    """Every shipped case, each configuration once."""
    for arch in architectures:
        for dtype in dtypes:
            for operator, variants in (cases_rows.VARIANTS | _VARIANTS).items():
                seen = set()
                for size in _sizes(operator):
                    config = _config(operator, arch, DTYPES[dtype], size)
                    # LayerNorm and attention are compiled for a width, the others for a tile.
                    key = config if operator in _TILED else (config, size)
                    if config is None or key in seen:
                        continue
                    seen.add(key)
                    for variant in variants:
                        yield Case(operator, variant, dtype, size, arch)


def _sizes(operator: str) -> tuple[int, ...]:
    if "loss" in operator or "cross_entropy" in operator:
        return cases_rows.CLASSES
    return HEAD_DIMS if operator.startswith("attention") else DIMS


def _config(operator: str, arch: int, dtype: torch.dtype, size: int) -> object:
    if operator in ("linear", "linear_fwd"):
        return configs.linear(arch, dtype, size, size)
    if operator == "output_gradient":
        return configs.output_gradient(size)
    if operator == "input_gradient":
        # Both forms, so that each of its configurations is compiled.
        return tuple(
            configs.input_gradient(arch, dtype, size, size, gelu=gelu) for gelu in (False, True)
        )
    if operator == "weight_gradient":
        return configs.weight_gradient(arch, dtype, size, size)
    if operator == "attention_bwd":
        return configs.attention_bwd(arch, dtype, size, _TOKENS)
    if operator.startswith("attention"):
        return configs.attention(arch, dtype, size, _TOKENS)
    if operator in cases_block.VARIANTS:
        return cases_block.config(operator, arch, dtype, size)
    if operator in cases_fp8.VARIANTS:
        return cases_fp8.config(operator, arch, dtype, size)
    if operator in cases_rows.VARIANTS:
        return cases_rows.config(operator, arch, dtype, size)
    return getattr(configs, operator)(arch, dtype, size)


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _attention(case: Case) -> common.Launch:
    dtype, heads = DTYPES[case.dtype], 12
    tokens = 577 if "577" in case.variant else _TOKENS
    # One spare element a token takes the strides off 16 bytes.
    spare = 1 if "unaligned" in case.variant else 0
    qkv = _empty(case.batch, tokens, 3 * heads * case.size + spare, dtype=dtype)
    key_bias = _empty(case.batch, tokens) if "bias" in case.variant else None
    qkv = qkv[..., : 3 * heads * case.size]
    if case.operator != "attention_bwd":
        config = configs.attention(case.arch, dtype, case.size, tokens, tma=not spare)
        lse = case.operator == "attention_fwd"
        return _launch(attention.plan(qkv, heads, 0.125, key_bias, save_lse=lse, config=config))
    bwd_config = configs.attention_bwd(case.arch, dtype, case.size, tokens, tma=not spare)
    if case.variant == "delta":
        bwd_config = dataclasses.replace(bwd_config, whole_head=False)
    out, row_lse = (
        _empty(case.batch, tokens, heads * case.size, dtype=dtype),
        _empty(case.batch, heads, tokens),
    )
    _, launches = attention_bwd.plan(
        out, qkv, out, row_lse, heads, 0.125, key_bias, config=bwd_config
    )
    return launches[0 if case.variant == "delta" else -1]


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
    x = _empty(case.batch, _TOKENS, dim, dtype=dtype)
    if "unaligned" in case.variant:
        x = _empty(case.batch, _TOKENS, dim + 1, dtype=dtype)[..., :dim]
    elif case.variant == "token slice":
        x = _empty(case.batch, _TOKENS + 1, dim, dtype=dtype)[:, 1:]
    weight, bias = _empty(dim, dim, dtype=dtype), _empty(dim, dtype=dtype)
    activation = case.variant.split()[0] if case.variant.startswith("gelu") else None
    options = _epilogue(case, x.shape)
    config = configs.linear(case.arch, dtype, dim, dim)
    affine = _empty(*x.shape, dtype=dtype) if case.operator == "linear_fwd" else None
    return _launch(linear.plan(x, weight, bias, activation, *options, affine=affine, config=config))


def _output_gradient(case: Case) -> common.Launch:
    dtype, dim = DTYPES[case.dtype], case.size
    dout = _empty(
        case.batch, _TOKENS, dim, dtype=torch.float32 if "fp32" in case.variant else dtype
    )
    affine = _empty(*dout.shape, dtype=dtype)
    activation = case.variant.split()[0] if case.variant.startswith("gelu") else None
    _, gamma, keep = _epilogue(case, dout.shape)
    return _launch(linear_bwd.plan(dout, dtype, affine, activation, gamma, keep))


def _spaced(case: Case) -> Tensor:
    """[T, D]; where descriptors shall not take it, its rows are off 16 bytes."""
    spare = 1 if "unaligned" in case.variant else 0
    rows = _empty(case.batch * _TOKENS, case.size + spare, dtype=DTYPES[case.dtype])
    return rows[:, : case.size]


def _input_gradient(case: Case) -> common.Launch:
    g, dtype, gelu = _spaced(case), DTYPES[case.dtype], "gelu" in case.variant
    weight, hidden = _empty(case.size, case.size, dtype=dtype), _empty(*g.shape, dtype=dtype)
    config = configs.input_gradient(case.arch, dtype, case.size, case.size, gelu=gelu)
    return _launch(products.plan_input_gradient(g, weight, hidden if gelu else None, config=config))


def _weight_gradient(case: Case) -> common.Launch:
    g, dtype = _spaced(case), DTYPES[case.dtype]
    x = _empty(case.batch, _TOKENS + 1, case.size, dtype=dtype)[:, 1:]
    if case.variant != "token slice":
        x = _empty(case.batch, _TOKENS, case.size, dtype=dtype)
    config = configs.weight_gradient(case.arch, dtype, case.size, case.size)
    programs = 1 if case.variant == "one part" else 132
    return _launch(products.plan_weight_gradient(g, x, config=config, programs=programs))


def _gelu_mlp(case: Case) -> common.Launch:
    dtype, dim = DTYPES[case.dtype], case.size
    x = _empty(case.batch, _TOKENS, dim, dtype=dtype)
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
    "attention": _attention,
    "attention_fwd": _attention,
    "attention_bwd": _attention,
    "linear": _linear,
    "gelu_mlp": _gelu_mlp,
    "linear_fwd": _linear,
    "output_gradient": _output_gradient,
    "input_gradient": _input_gradient,
    "weight_gradient": _weight_gradient,
    **cases_block.BUILDERS,
    **cases_fp8.BUILDERS,
}
