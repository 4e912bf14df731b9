"""What `deit tune` tries for each factory of `configs`, and what no GPU could run.

Shared memory is estimated from the tiles that a pipeline of `num_stages` keeps in flight. The
estimate only spares compilations: a candidate that the compiler refuses is dropped when it is
tried.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, replace
from typing import Any

import torch

from deit.kernels.device import configs
from deit.kernels.engine import tuning
from deit.kernels.fp8 import tiles as fp8_configs
from deit.kernels.fp8.quantize import GROUP

Arguments = Mapping[str, Any]
# fp32 accumulators a thread: with 256 and the addresses the compiler spills (255 registers).
ACCUMULATORS = 128
FP8_SUMS = 192  # 128 x 256 in 8 warps; fc1 compiles without spills


def candidates(factory: str, arguments: Arguments) -> list[Any]:
    """Legal configurations, the pinned one first, each once; None stands for the other form."""
    pinned = tuning.TUNABLE[factory].pinned(**arguments)
    space = _SPACES.get(factory, lambda _, pinned: iter(()))
    found = [pinned]
    for config in space(arguments, pinned):
        if config not in found and (config is None or not illegal(factory, config, arguments)):
            found.append(config)
    return found


def illegal(factory: str, config: Any, arguments: Arguments) -> list[str]:
    """Why `config` cannot run, or would silently run as another one; empty where it can."""
    found = [
        f"{f.name} is {getattr(config, f.name)}, expected a power of two"
        for f in fields(config)
        if f.name in _POWERS and not _power_of_two(getattr(config, f.name))
    ]
    found += [
        f"{name} is {getattr(config, name)}, expected {least} to {most}"
        for name, (least, most) in _RANGES.items()
        if not least <= getattr(config, name, least) <= most
    ]
    if found:
        return found
    arch, dtype = arguments.get("arch", 90), arguments.get("dtype", torch.bfloat16)
    if getattr(config, "tma", False) and (arch not in (90, 100) or not arguments.get("tma", True)):
        found.append("tma: tensor copies are for sm_90 and sm_100, and inputs that suit them")
    found += _RULES.get(type(config), lambda *_: [])(config, arguments)
    estimate = shared_memory(config, arguments, dtype.itemsize)
    if estimate > configs.SHARED_MEMORY[arch]:
        found.append(
            f"about {estimate} bytes of shared memory, sm_{arch} has {configs.SHARED_MEMORY[arch]}"
        )
    return found


_POWERS = {"block_m", "block_n", "block_k", "block_h", "chunk", "rows", "columns", "resident",
           "passing", "group", "block", "num_warps"}  # fmt: skip


# Tensor cores take tiles of 16 and more. `group` orders tiles and `programs` counts those of a
# multiprocessor: beyond these they say nothing. A file may hold any number.
_RANGES = {
    "num_warps": (1, 32),
    "num_stages": (1, 8),
    "programs": (1, 32),
    "group": (1, 64),
    "rows": (1, 64),
    **dict.fromkeys(("block_m", "block_n", "block_k", "block_h", "chunk", "resident", "passing"),
                    (16, 4096)),
}  # fmt: skip


def _power_of_two(value: int) -> bool:
    return value > 0 and value & (value - 1) == 0


def shared_memory(config: Any, arguments: Arguments, itemsize: int) -> int:
    """Bytes of the operand tiles in flight; 0 where a kernel keeps everything in registers."""
    if isinstance(config, configs.LinearConfig | configs.PatchEmbedConfig):
        stage = (config.block_m + config.block_n) * config.block_k * itemsize
        # An epilogue of 128 columns is written through shared memory.
        written = config.block_m * min(config.block_n, 128) * itemsize
        return config.num_stages * stage + (written if getattr(config, "tma", False) else 0)
    if isinstance(config, fp8_configs.Fp8Config):
        written = config.block_m * min(config.block_n, GROUP) * itemsize if config.tma else 0
        return config.num_stages * (config.block_m + config.block_n) * GROUP + written
    if isinstance(config, configs.PatchEmbedBwdConfig):
        return config.num_stages * (config.block_m + config.block_n) * config.block_k * itemsize
    head = arguments.get("head_dim", 64) * itemsize
    if isinstance(config, configs.AttentionConfig):
        keys = 2 * config.block_n * (config.num_stages if config.online else 1)
        return (keys + config.block_m) * head
    if isinstance(config, configs.AttentionBwdConfig):
        return (2 * config.resident + 2 * config.num_stages * config.passing) * head
    if isinstance(config, configs.PanelConfig):
        weights = config.num_stages * 3 * config.chunk * config.block_n
        x = 3 * config.block_m * config.chunk
        return (x + weights + config.block_m * config.block_n) * itemsize
    if isinstance(config, configs.MlpConfig):
        x = 3 * config.block_m * config.chunk
        weights = 2 * 3 * config.chunk * config.block_h
        return (x + weights + config.block_m * config.block_h) * itemsize
    return 0


def _tile(rows: int, columns: int, warps: int) -> list[str]:
    """Accumulators that one thread would have to hold."""
    each = rows * columns // (32 * warps)
    if each <= ACCUMULATORS:
        return []
    return [f"{each} accumulators a thread, {ACCUMULATORS} fit its registers"]


def _linear_rules(config: configs.LinearConfig, arguments: Arguments) -> list[str]:
    found = _tile(config.block_m, config.block_n, config.num_warps)
    width, depth = arguments["width"], arguments["depth"]
    if config.block_n > 2 * width or config.block_k > 2 * depth:
        found.append(f"a tile of {config.block_n} x {config.block_k} for {width} x {depth}")
    if not config.tma and config.block_n > 128:
        found.append("block_n above 128 without tma, which runs as 128")
    return found


def _fp8_rules(config: fp8_configs.Fp8Config, arguments: Arguments) -> list[str]:
    """Beside the accumulators stands the product of 128 columns that is added to them next."""
    each = config.block_m * (config.block_n + GROUP) // (32 * config.num_warps)
    found = [] if each <= FP8_SUMS else [f"{each} sums a thread, {FP8_SUMS} fit its registers"]
    if config.block_n not in ((GROUP, 2 * GROUP) if config.tma else (GROUP,)):
        found.append(f"block_n {config.block_n}: {GROUP}, or {2 * GROUP} with tma, is there")
    return found


def _attention_rules(config: configs.AttentionConfig, arguments: Arguments) -> list[str]:
    if config.online:
        return _tile(config.block_m, config.block_n, config.num_warps)
    found = []
    if config.block_n < arguments["tokens"]:
        found.append(f"block_n {config.block_n} for {arguments['tokens']} keys at once")
    if not config.tma:
        found.append("all keys at once need tma")
    return found + _tile(config.block_m, config.block_n, config.num_warps)


def _attention_bwd_rules(config: configs.AttentionBwdConfig, arguments: Arguments) -> list[str]:
    if config.whole_head and config.resident < arguments["tokens"]:
        return [f"resident {config.resident} for a head of {arguments['tokens']} tokens"]
    if config.whole_head and not config.tma:
        return ["a whole head at once needs tma"]
    return []


def _mlp_rules(config: configs.MlpConfig, arguments: Arguments) -> list[str]:
    found = _tile(config.block_m, 3 * config.chunk, config.num_warps)
    if 3 * config.chunk != arguments["dim"]:
        found.append(f"chunk {config.chunk}: D is {arguments['dim']}, expected 3 * chunk")
    if not config.tma:
        found.append("the one-kernel form needs tma")
    return found


def _panel_rules(config: configs.PanelConfig, arguments: Arguments) -> list[str]:
    found = _tile(config.block_m, config.block_n, config.num_warps)
    if 3 * config.chunk != arguments["depth"]:
        found.append(f"chunk {config.chunk}: D is {arguments['depth']}, expected 3 * chunk")
    if arguments["arch"] not in (90, 100) or arguments["dtype"] == torch.float32:
        found.append("a panel needs tensor copies, and half precision")
    return found


_RULES: dict[type, Callable[[Any, Arguments], list[str]]] = {
    configs.LinearConfig: _linear_rules,
    fp8_configs.Fp8Config: _fp8_rules,
    configs.AttentionConfig: _attention_rules,
    configs.AttentionBwdConfig: _attention_bwd_rules,
    configs.MlpConfig: _mlp_rules,
    configs.PanelConfig: _panel_rules,
    configs.PatchEmbedConfig: lambda c, a: _tile(c.block_m, c.block_n, c.num_warps),
    configs.PatchEmbedBwdConfig: lambda c, a: _tile(c.block_m, c.block_n, c.num_warps),
}


def _linear(arguments: Arguments, pinned: configs.LinearConfig) -> Iterator[Any]:
    """Tiles about the pinned one first: where time is short, these are what is tried."""
    tiles: tuple[tuple[int, int], ...]
    if arguments["dtype"] == torch.float32:
        tiles, ks = ((64, 64), (128, 64), (64, 128)), (16, 32)
    else:
        tiles, ks = ((128, 256), (128, 128), (256, 128), (64, 256), (128, 64), (64, 128)), (64, 32)
    for (block_m, block_n), block_k, stages, warps in itertools.product(tiles, ks, (3, 4), (8, 4)):
        yield replace(pinned, block_m=block_m, block_n=block_n, block_k=block_k,
                      num_stages=stages, num_warps=warps)  # fmt: skip


def _fp8_product(arguments: Arguments, pinned: fp8_configs.Fp8Config) -> Iterator[Any]:
    tiles = ((128, 256), (128, 128), (64, 128), (64, 256))
    for (m, n), stages, warps in itertools.product(tiles, (3, 4, 2), (8, 4)):
        yield replace(pinned, block_m=m, block_n=n, num_stages=stages, num_warps=warps)


def _attention(arguments: Arguments, pinned: configs.AttentionConfig) -> Iterator[Any]:
    everything = max(16, 1 << (arguments["tokens"] - 1).bit_length())
    for block_m, warps in itertools.product((64, 128), (4, 8)):
        if arguments["tokens"] <= configs.ONE_BLOCK_KEYS:
            yield configs.AttentionConfig(block_m, everything, False, tma=True, num_warps=warps,
                                          num_stages=3)  # fmt: skip
        for block_n, stages in itertools.product((64, 128, 32), (3, 2)):
            yield configs.AttentionConfig(block_m, block_n, True, tma=pinned.tma, num_warps=warps,
                                          num_stages=stages)  # fmt: skip


def _attention_bwd(arguments: Arguments, pinned: configs.AttentionBwdConfig) -> Iterator[Any]:
    everything = max(64, 1 << (arguments["tokens"] - 1).bit_length())
    if arguments["arch"] == 90 and arguments["tokens"] <= configs.ONE_BLOCK_KEYS:
        for passing in (32, 64):
            yield configs.AttentionBwdConfig(everything, passing, True, tma=True, num_warps=8,
                                             num_stages=3)  # fmt: skip
    for resident, passing, warps in itertools.product((64, 128), (64, 32, 128), (4, 8)):
        yield replace(pinned, resident=resident, passing=passing, whole_head=False,
                      num_warps=warps)  # fmt: skip


def _gelu_mlp(arguments: Arguments, pinned: configs.MlpConfig | None) -> Iterator[Any]:
    yield None  # two products
    chunk = arguments["dim"] // 3
    for block_m, block_h, warps in itertools.product((128, 64), (64, 32, 128), (8, 4)):
        yield configs.MlpConfig(block_m, block_h, chunk, tma=True, num_warps=warps, num_stages=3)


def _norm_panel(arguments: Arguments, pinned: configs.PanelConfig | None) -> Iterator[Any]:
    yield None  # LayerNorm in a kernel of its own
    chunk = arguments["depth"] // 3
    for block_m, block_n, stages in itertools.product((128, 64), (128, 64), (2, 3)):
        yield configs.PanelConfig(block_m, block_n, chunk, num_warps=8, num_stages=stages)


def _layer_norm(arguments: Arguments, pinned: configs.LayerNormConfig) -> Iterator[Any]:
    for rows, warps in itertools.product((1, 2, 4, 8, 16), (4, 8, 2)):
        yield configs.LayerNormConfig(rows, warps)


def _layer_norm_bwd(arguments: Arguments, pinned: configs.LayerNormBwdConfig) -> Iterator[Any]:
    for rows, programs, warps in itertools.product((1, 2, 4, 8), (2, 1, 4), (4, 8)):
        yield replace(pinned, rows=rows, programs=programs, num_warps=warps)


def _patch_embed(arguments: Arguments, pinned: configs.PatchEmbedConfig) -> Iterator[Any]:
    for (m, n), k, stages, warps in itertools.product(
        ((128, 128), (64, 128), (128, 64)), (32, 64), (3, 4), (8, 4)
    ):
        yield configs.PatchEmbedConfig(m, n, k, num_warps=warps, num_stages=stages)


_SPACES: dict[str, Callable[[Arguments, Any], Iterator[Any]]] = {
    "linear": _linear,
    "fp8_product": _fp8_product,
    "norm_panel": _norm_panel,
    "input_gradient": _linear,
    "weight_gradient": _linear,
    "attention": _attention,
    "attention_bwd": _attention_bwd,
    "gelu_mlp": _gelu_mlp,
    "layer_norm": _layer_norm,
    "layer_norm_bwd": _layer_norm_bwd,
    "patch_embed": _patch_embed,
}
