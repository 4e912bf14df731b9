"""Tile sizes: one pinned default per operator, architecture, dtype and width.

Nothing is tuned at call time, so a call never compiles more than one kernel and its result
depends on nothing but its inputs. No configuration here has been timed on a GPU yet: each was
chosen from the arithmetic in its comment and from what the compiler reports for it (registers,
spills, shared memory, matrix instructions: `python -m deit.kernels.prove.aot`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from deit.kernels.device.chips import SHARED_MEMORY as SHARED_MEMORY  # part of this interface
from deit.kernels.device.chips import family as family
from deit.kernels.engine.tuning import tunable

# Up to this many keys are held at once: 197 and 198 tokens pad to 256.
ONE_BLOCK_KEYS = 256

# Widths of a head that a descriptor's block, whose sides are powers of two, covers exactly.
TMA_HEAD_DIMS = (32, 64, 128)


@dataclass(frozen=True)
class LayerNormConfig:
    """rows: rows of the matrix a program normalises; a power of two."""

    rows: int
    num_warps: int


@dataclass(frozen=True)
class LayerNormBwdConfig:
    """rows: rows at a time, a power of two; programs: how many a multiprocessor has."""

    rows: int
    programs: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class LossConfig:
    """block: classes a program holds at once."""

    block: int
    num_warps: int


@dataclass(frozen=True)
class PatchEmbedConfig:
    """Output tiles of block_m tokens x block_n channels, block_k pixels of the sum at a time."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class PatchEmbedBwdConfig:
    """Tiles of block_m channels x block_n pixels of dweight, block_k patches at a time.

    programs: for how many a multiprocessor the sum over patches is split.
    """

    block_m: int
    block_n: int
    block_k: int
    programs: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class AttentionConfig:
    """block_m queries meet block_n keys at a time.

    online: softmax rescales as blocks of keys pass; else block_n holds every key.
    tma: read qkv by tensor descriptors where its strides and address allow them.
    """

    block_m: int
    block_n: int
    online: bool
    tma: bool
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class AttentionBwdConfig:
    """`resident` keys or queries stay on chip while the others pass, `passing` at a time.

    whole_head: all queries of a head are resident, and one program does the head; `resident` is
        at least the number of tokens.
    tma: read qkv and dout by tensor descriptors.
    """

    resident: int
    passing: int
    whole_head: bool
    tma: bool
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class LinearConfig:
    """Output tiles of block_m x block_n, block_k of the sum at a time.

    group: tiles are numbered down `group` rows of tiles before the next column, for L2 reuse.
    tma: read x and weight and write the output by tensor descriptors where strides and
        addresses allow them.
    flatten: the loops over tiles and over the sum are one pipeline, so that the next tile's
        operands are on their way during this one's epilogue.
    programs: how many a multiprocessor has: of two, one multiplies during the other's epilogue.
    """

    block_m: int
    block_n: int
    block_k: int
    group: int
    tma: bool
    num_warps: int
    num_stages: int
    flatten: bool = False
    programs: int = 1

    def epilogues(self, columns: int = 128) -> int:
        """Blocks of that many columns in which the epilogue runs.

        A 128 x 256 tile at once spills 100 to 350 bytes.
        """
        return max(1, self.block_n // columns)

    def without_tma(self) -> LinearConfig:
        """For inputs no descriptor can take.

        Pointers to a 128 x 256 tile would spill, and those to any flattened or in 4 warps do.
        """
        if not self.tma:
            return self
        block_n = min(self.block_n, 128)
        return replace(self, tma=False, block_n=block_n, num_warps=8, flatten=False, programs=1)


@dataclass(frozen=True)
class OutputGradientConfig:
    """The elementwise pass of `linear`'s backward: `chunk` rows of `columns` columns a program,
    `rows` at a time, and one partial sum a column."""

    chunk: int
    rows: int
    columns: int
    num_warps: int


@dataclass(frozen=True)
class MlpConfig:
    """The single-kernel MLP: block_m rows stay on chip while the hidden layer passes by.

    chunk: D = 3 * chunk (every DeiT width is three times a power of two, tiles are powers of
        two). block_h: hidden channels at a time.
    """

    block_m: int
    block_h: int
    chunk: int
    tma: bool
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class PanelConfig:
    """A product whose block_m rows of x stay on chip, normalised once, while all of weight passes.

    chunk: as MlpConfig's. block_n: output columns at a time. The rows come by tensor descriptors.
    """

    block_m: int
    block_n: int
    chunk: int
    num_warps: int
    num_stages: int


@tunable(LayerNormConfig)
def layer_norm(arch: int, dtype: torch.dtype, dim: int) -> LayerNormConfig:
    """About 32 elements a thread: enough loads in flight to cover memory latency."""
    padded = 1 << max(dim - 1, 0).bit_length()
    num_warps = 4 if padded <= 4096 else 16
    # On sm_120 under triton 3.8 32 spill 8 bytes in narrow rows of fp32.
    elements = 16 if arch == 120 and dtype == torch.float32 and padded <= 256 else 32
    rows = max(1, min(16, num_warps * 32 * elements // padded))
    return LayerNormConfig(rows=rows, num_warps=num_warps)


@tunable(LayerNormBwdConfig)
def layer_norm_bwd(arch: int, dtype: torch.dtype, dim: int) -> LayerNormBwdConfig:
    """16 elements a thread: without gamma, operands and sums of them fit 128 registers.

    Then two programs of 8 warps are resident, each with its next 4096 elements of every input on
    their way (cp.async): 32 KB a multiprocessor for two bf16 inputs, where 3.3 TB/s at 700 ns of
    latency need 18. With gamma it is 171 registers, one program, and 24 KB or more.
    """
    padded = 1 << max(dim - 1, 0).bit_length()
    num_warps = 8 if padded <= 8192 else 32
    # On sm_90 under triton 3.6 the one spills 8 bytes in narrow rows of fp32, the other in wide.
    elements = 8 if dtype == torch.float32 and padded <= 512 else 16
    rows = max(1, min(16, num_warps * 32 * elements // padded))
    return LayerNormBwdConfig(rows=rows, programs=2, num_warps=num_warps, num_stages=2)


@tunable(LossConfig)
def loss(classes: int) -> LossConfig:
    """ImageNet's 1,000 classes in one block, 8 a thread; ImageNet-21k's in eleven of 2,048.

    With 4,096, 16 a thread, the gradient of cross-entropy spills 40 bytes on sm_120 in fp16.
    """
    block = min(2048, 1 << max(classes - 1, 15).bit_length())
    return LossConfig(block=block, num_warps=4 if block <= 1024 else 8)


@tunable(PatchEmbedConfig)
def patch_embed(arch: int, dtype: torch.dtype, dim: int) -> PatchEmbedConfig:
    """Pointers, since a patch is no rectangle of the batch that a descriptor could describe."""
    if dtype == torch.float32:  # 64 tokens in 4 warps spill 8 bytes on sm_120
        return PatchEmbedConfig(128, 64, 16, num_warps=8, num_stages=3)
    block_n = 128 if dim % 128 == 0 else 64
    block_k = 64 if arch in (80, 90, 100) else 32
    return PatchEmbedConfig(128, block_n, block_k, num_warps=8, num_stages=3)


@tunable(PatchEmbedBwdConfig)
def patch_embed_bwd(arch: int, dtype: torch.dtype, dim: int) -> PatchEmbedBwdConfig:
    """Two programs of 8 warps a multiprocessor: 64 registers a thread of accumulator each."""
    if dtype == torch.float32:
        return PatchEmbedBwdConfig(64, 64, 16, programs=2, num_warps=4, num_stages=3)
    block_m = 128 if dim % 128 == 0 else 64
    block_k = 64 if arch in (80, 90, 100) else 32
    return PatchEmbedBwdConfig(block_m, 128, block_k, programs=2, num_warps=8, num_stages=3)


@tunable(AttentionConfig)
def attention(
    arch: int, dtype: torch.dtype, head_dim: int, tokens: int, tma: bool = True
) -> AttentionConfig:
    """`tma`: whether the input's strides and address suit a descriptor.

    All keys of one head at once need a matrix unit that reads them from shared memory (wgmma,
    tcgen05). With mma.sync they sit in registers and 64 x 256 scores spill 100 to 450 bytes, as
    they do on Hopper without tensor copies.
    """
    if dtype == torch.float32:
        # IEEE products run on the plain cores, operands in registers. Larger tiles, 4 warps, 16 x
        # 32 for 80 channels and 16 x 16 for 128 (80 on sm_120) spill 8 to 64 bytes somewhere.
        block_m = 32 if head_dim <= 64 else 16
        block_n = 16 if head_dim in (80, 96) and arch != 120 else 32
        return AttentionConfig(block_m, block_n, True, tma=False, num_warps=8, num_stages=2)
    if arch not in (90, 100) or not tma or head_dim not in TMA_HEAD_DIMS:
        # 128 channels: fewer keys at a time, or the operands spill 8 to 56 bytes.
        block_m, block_n, warps = (64, 64, 4) if head_dim <= 64 else (128, 32, 8)
        if head_dim == 32:
            block_n = 32  # 64 keys spill 8 bytes on sm_80, with two stages or with three
        return AttentionConfig(block_m, block_n, True, tma=False, num_warps=warps, num_stages=3)
    if arch == 90 and head_dim == 64:
        # Measured on an H100, bf16, microseconds: 197 tokens, 12 / 6 / 3 heads, 256 images 174 / 88
        # / 48 by 32 keys, 176 / 95 / 52 with all keys at once, in 252 registers that may spill.
        # 577 tokens, 12 heads, 64 images: 230 by 128 keys, 244 by 128 queries and 64 keys.
        block_n, stages = (32, 3) if tokens <= ONE_BLOCK_KEYS else (128, 2)
        return AttentionConfig(64, block_n, True, tma=True, num_warps=4, num_stages=stages)
    if tokens <= ONE_BLOCK_KEYS and head_dim == 64:
        # 64 x 256 fp32 scores are 128 registers a thread in 4 warps, and spill 200 bytes. Heads
        # of 32 and 128 channels, which no DeiT has, spill 8 to 48 bytes under triton 3.6.
        block_n = max(16, 1 << (tokens - 1).bit_length())
        return AttentionConfig(64, block_n, False, tma=True, num_warps=8, num_stages=3)
    if head_dim == 32 and arch == 100:
        # No DeiT has such heads. By 128 queries and 8 warps they spill 8 bytes here, by 64 keys
        # with a bias under triton 3.8.
        return AttentionConfig(64, 32, True, tma=True, num_warps=4, num_stages=3)
    stages = 3 if head_dim <= 64 else 2
    return AttentionConfig(128, 64, True, tma=True, num_warps=8, num_stages=stages)


@tunable(AttentionBwdConfig)
def attention_bwd(
    arch: int, dtype: torch.dtype, head_dim: int, tokens: int, tma: bool = True
) -> AttentionBwdConfig:
    """`tma`: whether qkv's strides and address suit a descriptor.

    A whole head of 256 x 64 on Hopper: q and dout are 64 KB of shared memory, keys and values 32
    at a time and p, ds between the products bring it to 123 KB; dq is 64 registers a thread in 8
    warps, 32 columns of scores and of dp 32 each: at most 243 in all. 32 keys also waste least:
    197 tokens are 7 blocks of 32 (224) and 4 of 64 (256). Blackwell spills 16 to 112 bytes there.
    """
    tma = tma and arch in (90, 100) and head_dim in TMA_HEAD_DIMS
    if dtype == torch.float32:
        # 128 channels: 32 at a time spill 450 bytes on Hopper. Two stages of 64: 8 on Blackwell.
        passing, stages = (32, 3) if head_dim <= 64 else (16, 2)
        return AttentionBwdConfig(32, passing, False, tma=False, num_warps=8, num_stages=stages)
    if arch == 90 and tma and tokens <= ONE_BLOCK_KEYS and head_dim == 64:
        resident = max(64, 1 << (tokens - 1).bit_length())
        # Two stages spill 8 bytes under triton 3.6 with a key bias; the third takes 8 KB.
        return AttentionBwdConfig(resident, 32, True, tma=True, num_warps=8, num_stages=3)
    if head_dim <= 64:
        # By pointers 64 x 64 spills 8 to 56 bytes on one architecture or another.
        passing = 64 if tma else 32
        # Heads of 32 channels, which no DeiT has, spill 8 bytes in 4 warps of mma.sync on sm_120.
        warps = 8 if head_dim == 32 and not tma else 4
        return AttentionBwdConfig(64, passing, False, tma=tma, num_warps=warps, num_stages=2)
    # 64 x 64 spills 72 bytes; so do 4 warps of mma.sync, 16.
    return AttentionBwdConfig(64, 32, False, tma=tma, num_warps=4 if tma else 8, num_stages=2)


@tunable(LinearConfig)
def linear(arch: int, dtype: torch.dtype, width: int, depth: int) -> LinearConfig:
    """`width` output channels, `depth` summed ones."""
    if dtype == torch.float32:
        return LinearConfig(64, 64, 16, group=8, tma=False, num_warps=4, num_stages=3)
    # 192 = 3 * 64, 384 = 3 * 128 and 768 = 3 * 256 columns: the widest tile that wastes none.
    block_n = 256 if width % 256 == 0 else 128 if width % 128 == 0 else 64
    if arch == 90:
        # Measured on an H100, bf16, 256 images of 197 tokens: flattened against not, microseconds:
        # DeiT-B qkv 264, 295; fc1 421, 460; DeiT-S qkv 91, 118. Of 64 columns two programs of 4
        # warps, against one of 8 not flattened: DeiT-Ti qkv 37, 71; fc2 55, 68; proj 28, 40.
        if block_n == 64:
            return LinearConfig(128, 64, 64, 8, True, 4, 3, flatten=True, programs=2)
        stages = 3 if block_n == 256 else 4
        return LinearConfig(128, block_n, 64, 8, True, 8, stages, flatten=True)
    if arch == 100:
        stages = 3 if block_n == 256 else 4
        return LinearConfig(128, block_n, 64, group=8, tma=True, num_warps=8, num_stages=stages)
    block_n = min(block_n, 128)
    if arch == 80:
        return LinearConfig(128, block_n, 64, group=8, tma=False, num_warps=8, num_stages=3)
    return LinearConfig(128, block_n, 32, group=8, tma=False, num_warps=8, num_stages=4)


@tunable(PanelConfig)
def norm_panel(arch: int, dtype: torch.dtype, width: int, depth: int) -> PanelConfig | None:
    """None where LayerNorm in a kernel of its own is expected to be no slower.

    At D = 384 64 rows and 64 columns at a time are what fits without spills: products so narrow
    that reading their operands from shared memory takes twice as long as multiplying them.
    """
    if dtype == torch.float32 or arch not in (90, 100) or depth != 192:
        return None
    block_n = 128 if arch == 90 else 64  # 128 columns of GELU spill 64 bytes on sm_100
    return PanelConfig(128, block_n, depth // 3, num_warps=8, num_stages=2)


@tunable(OutputGradientConfig)
def output_gradient(width: int) -> OutputGradientConfig:
    """2048 elements a program at a time; 2364 programs for DeiT-B's 50432 x 768."""
    columns = 128 if width % 128 == 0 else 64
    return OutputGradientConfig(chunk=128, rows=2048 // columns, columns=columns, num_warps=4)


@tunable(LinearConfig)
def input_gradient(
    arch: int, dtype: torch.dtype, width: int, depth: int, *, gelu: bool
) -> LinearConfig:
    """`width` input channels, summed over `depth` output channels."""
    if dtype == torch.float32 and arch == 120:  # 4 warps spill 16 bytes under triton 3.8
        return LinearConfig(64, 64, 16, group=8, tma=False, num_warps=8, num_stages=3)
    return linear.pinned(arch, dtype, width, depth)


@tunable(LinearConfig)
def weight_gradient(arch: int, dtype: torch.dtype, width: int, depth: int) -> LinearConfig:
    """A `width` x `depth` matrix, summed over the rows of x."""
    if dtype == torch.float32:  # 64 x 64 in 4 warps spill 8 to 32 bytes; here too a thread sums 32
        return LinearConfig(128, 64, 16, group=8, tma=False, num_warps=8, num_stages=3)
    return linear.pinned(arch, dtype, depth, width)


def splits(tiles: int, steps: int, programs: int) -> int:
    """Into how many parts to cut a sum of `steps` blocks for each of `tiles` tiles.

    The fewest steps for the busiest of `programs`, plus what the parts cost to write and read:
    a 128 x 256 tile in fp32 and back is 0.26 MB, 0.09 us at 3 TB/s, an eighth of the 0.7 us that
    its step of 64 takes a multiprocessor of an H100.
    """

    def cost(count: int) -> float:
        return -(-tiles * count // programs) * -(-steps // count) + count * tiles / 8

    return min(range(1, min(steps, 64) + 1), key=cost)


@tunable(MlpConfig)
def gelu_mlp(arch: int, dtype: torch.dtype, dim: int) -> MlpConfig | None:
    """None where two products with the hidden layer in memory are expected to be faster.

    At D = 192 one kernel reads 0.6 MB of weights from L2 for every 128 rows, 0.23 GB at batch
    256, and saves writing and reading 155 MB of hidden layer. At D = 384 the accumulators
    (384 fp32 columns) leave room for 64 rows: 2.4 MB of weights for each 64 rows are 1.9 GB of
    L2 traffic, against 310 MB saved, so there the hidden layer goes through memory.
    """
    if dtype == torch.float32 or dim != 192:
        return None
    if arch in (90, 100):
        return MlpConfig(128, 64, 64, tma=True, num_warps=8, num_stages=3)
    return None
