"""W8A8 products of many tokens on Hopper, in Gluon: the level of Triton below tl.dot.

tl.dot waits for an integer product before the next one is issued, so that the tensor cores stand still in between.
Here one product is always in flight:

    block of channels         k            k + 1            k + 2
    tensor cores         |== product k ==|== product k + 1 ==|== ...
    threads               issue k + 1,    issue k + 2,
                          wait for k,     wait for k + 1,
                          load k + 3      load k + 4           into the buffers of k - 1 and k, which are free by then

x and the weight come into shared memory by the tensor memory accelerator, a block of channels of both to a stage.  A
stage's barrier tells when both are there.  What lies beyond the matrices arrives as zeros.

Gluon has no interpreter, and its names differ between versions of Triton: gemm.py says where this kernel stands in.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from baichuan.kernels.operand import Operand
from baichuan.kernels.spec import cdiv, overlaps
from baichuan.kernels.tiles import Tile

BAND = 8  # as in tiles.place_of_tile
# By the number of rows, as tiles.TILES; what measures fastest on an H200 (docs/performance.md).
TILES = ((2048, Tile(128, 128, 128, 4, 3)), (None, Tile(128, 256, 128, 8, 4)))
INSTRUCTION_CHANNELS = 128  # output channels of one instruction of the tensor cores; for integers Triton has no 256

load_block = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared  # before Triton 3.8


@gluon.jit
def _gemm_int8(
    x, weight, x_scale, scale,
    num_rows, in_features, out_features,
    y,
    ROW_SCALES: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
    BAND: gl.constexpr, SUMS: gl.constexpr, ROWS: gl.constexpr, OVERLAP: gl.constexpr,
):  # fmt: skip
    """x, weight: descriptors of blocks [BLOCK_M, BLOCK_K] and [BLOCK_N, BLOCK_K]; SUMS, ROWS: layouts of a tile of y
    as the tensor cores leave it and as it is stored, in runs of a row.
    """
    if OVERLAP:
        gdc_launch_dependents()
    blocks_m, blocks_n = gl.cdiv(num_rows, BLOCK_M), gl.cdiv(out_features, BLOCK_N)
    band = gl.program_id(0) // (BAND * blocks_n)
    band_height = gl.minimum(blocks_m - band * BAND, BAND)
    place = gl.program_id(0) % (BAND * blocks_n)
    row, column = (band * BAND + place % band_height) * BLOCK_M, (place // band_height) * BLOCK_N

    x_blocks = gl.allocate_shared_memory(gl.int8, [STAGES, BLOCK_M, BLOCK_K], x.layout)
    w_blocks = gl.allocate_shared_memory(gl.int8, [STAGES, BLOCK_N, BLOCK_K], weight.layout)
    loaded = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(loaded.index(i), count=1)
    fence_async_shared()
    STAGE_BYTES: gl.constexpr = (BLOCK_M + BLOCK_N) * BLOCK_K
    steps = gl.cdiv(in_features, BLOCK_K)
    for i in gl.static_range(STAGES - 1):  # the weight does not depend on the kernel before
        mbarrier.expect(loaded.index(i), STAGE_BYTES, pred=i < steps)
        load_block(weight, [column, i * BLOCK_K], loaded.index(i), w_blocks.index(i), pred=i < steps)
    if OVERLAP:
        gdc_wait()
    for i in gl.static_range(STAGES - 1):
        load_block(x, [row, i * BLOCK_K], loaded.index(i), x_blocks.index(i), pred=i < steps)

    sums = gl.zeros((BLOCK_M, BLOCK_N), gl.int32, SUMS)
    for step in range(steps):
        stage = step % STAGES
        mbarrier.wait(loaded.index(stage), (step // STAGES) & 1)
        sums = warpgroup_mma(x_blocks.index(stage), w_blocks.index(stage).permute((1, 0)), sums, is_async=True)
        sums = warpgroup_mma_wait(1, deps=(sums,))
        ahead = step + STAGES - 1  # goes where the step before, which has been waited for, was read from
        free = ahead % STAGES
        mbarrier.expect(loaded.index(free), STAGE_BYTES, pred=ahead < steps)
        load_block(x, [row, ahead * BLOCK_K], loaded.index(free), x_blocks.index(free), pred=ahead < steps)
        load_block(weight, [column, ahead * BLOCK_K], loaded.index(free), w_blocks.index(free), pred=ahead < steps)
    sums = warpgroup_mma_wait(0, deps=(sums,))

    result = sums.to(gl.float32)
    if ROW_SCALES:
        m = row + gl.arange(0, BLOCK_M, gl.SliceLayout(1, SUMS))
        result *= gl.expand_dims(gl.load(x_scale + m, m < num_rows, other=0.0), 1)
    else:
        result *= gl.load(x_scale)
    n = column + gl.arange(0, BLOCK_N, gl.SliceLayout(0, SUMS))
    result *= gl.expand_dims(gl.load(scale + n, n < out_features, other=0.0), 0)
    result = gl.convert_layout(result.to(y.dtype.element_ty), ROWS)
    m = row + gl.arange(0, BLOCK_M, gl.SliceLayout(1, ROWS))
    n = column + gl.arange(0, BLOCK_N, gl.SliceLayout(0, ROWS))
    target = gl.expand_dims(m.to(gl.int64) * out_features, 1) + gl.expand_dims(n, 0)
    gl.store(y + target, result, gl.expand_dims(m < num_rows, 1) & gl.expand_dims(n < out_features, 0))


def block_layout(rows: int, block_k: int) -> gl.NVMMASharedLayout:
    """How a block of int8 lies in shared memory."""
    return gl.NVMMASharedLayout.get_default_for([rows, block_k], gl.int8)


def constants(tile: Tile) -> dict[str, object]:
    """The kernel's constants that the tile decides."""
    channels = min(tile.block_n, INSTRUCTION_CHANNELS)
    return {
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "STAGES": tile.num_stages,
        "BAND": BAND,
        "SUMS": gl.NVMMADistributedLayout([3, 0], [tile.num_warps, 1], [16, channels, 32]),
        "ROWS": gl.BlockedLayout([1, 8], [2, 16], [tile.num_warps, 1], [1, 0]),
    }


def gemm_int8(x: Operand, weight: Tensor, scale: Tensor, out_dtype: torch.dtype, tile: Tile | None = None) -> Tensor:
    """y = (x @ weightᵀ) * x.scale * scale, the same bits as gemm.gemm's.

    x: [num_tokens, in_features] int8 with its scale; weight: [out_features, in_features] int8; scale: [out_features]
    float32; in_features: a multiple of 16; tile: of a power of two of warps, 64 rows or more for every four of them;
    None = what measured fastest -> [num_tokens, out_features]
    """
    values, x_scale = x.scaled
    (num_rows, in_features), out_features = values.shape, weight.shape[0]
    tile = tile or next(tile for limit, tile in TILES if limit is None or num_rows <= limit)
    y = torch.empty(num_rows, out_features, dtype=out_dtype, device=weight.device)
    blocks = [
        TensorDescriptor.from_tensor(matrix, [rows, tile.block_k], block_layout(rows, tile.block_k))
        for matrix, rows in ((values, tile.block_m), (weight, tile.block_n))
    ]
    overlap = overlaps(weight.device)
    _gemm_int8[(cdiv(num_rows, tile.block_m) * cdiv(out_features, tile.block_n),)](
        *blocks,
        x_scale,
        scale,
        num_rows,
        in_features,
        out_features,
        y,
        ROW_SCALES=x_scale.numel() > 1,
        OVERLAP=overlap,
        **constants(tile),
        num_warps=tile.num_warps,
        enable_fp_fusion=True,
        **({"launch_pdl": True} if overlap else {}),
    )
    return y
