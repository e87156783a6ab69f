"""W8A8 products of several tokens on Hopper, in Gluon: the level of Triton below tl.dot.

tl.dot waits for an integer product before the next one is issued, so that the tensor cores stand still in between.
Here one product is always in flight:

    block of channels         k            k + 1            k + 2
    tensor cores         |== product k ==|== product k + 1 ==|== ...
    threads               issue k + 1,    issue k + 2,
                          wait for k,     wait for k + 1,
                          load k + 3      load k + 4           into the buffers of k - 1 and k, which are free by then

x and the weight come into shared memory by the tensor memory accelerator, a block of channels of both to a stage.  A
stage's barrier tells when both are there.  What lies beyond the matrices arrives as zeros.

A tile's output channels are two runs.  They are neighbours, or those of a gate and of its up, whose activation is then
written in place of both:

    y      [ .. first | second .. ]          gate_up   [ .. first .. | .. second .. ]
                                             out       [ .. silu(first) * second .. ]

Gluon has no interpreter, and its names differ between versions of Triton: executors/cuda/linear.py says where this
kernel is taken.
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

from baichuan.kernels.gemm_parts import scale_sums
from baichuan.kernels.operand import Operand, StaticScale
from baichuan.kernels.spec import cdiv, overlaps, processors
from baichuan.kernels.store_row import divide, nearest_integer
from baichuan.kernels.tiles import TILE_256, RunsTile, choose_runs_tile, share_of_split

BAND = 16  # as in tiles.place_of_tile; programs that run at once then read about as much of x as of the weight
GL_TYPES = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16, torch.float32: gl.float32}

load_block = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared  # before Triton 3.8
quotient, integer, share = gluon.jit(divide.fn), gluon.jit(nearest_integer.fn), gluon.jit(share_of_split.fn)


@gluon.jit
def _scaled(sums, x_scale, scale, row, column, num_rows, end, ROW_SCALES: gl.constexpr):
    """The sums of a run times their scales, in float32.  column: of the run's first channel; end: of the matrix"""
    LAYOUT: gl.constexpr = sums.type.layout
    result = sums.to(gl.float32)
    if ROW_SCALES:
        m = row + gl.arange(0, sums.shape[0], gl.SliceLayout(1, LAYOUT))
        result *= gl.expand_dims(gl.load(x_scale + m, m < num_rows, other=0.0), 1)
    else:
        result *= gl.load(x_scale)
    n = column + gl.arange(0, sums.shape[1], gl.SliceLayout(0, LAYOUT))
    return result * gl.expand_dims(gl.load(scale + n, n < end, other=0.0), 0)


@gluon.jit
def _store(result, row, column, num_rows, width, y, LAYOUT: gl.constexpr):
    """Write a run of y, whose rows have `width` numbers, in the layout's order: in pieces of a row."""
    result = gl.convert_layout(result, LAYOUT)
    m = row + gl.arange(0, result.shape[0], gl.SliceLayout(1, LAYOUT))
    n = column + gl.arange(0, result.shape[1], gl.SliceLayout(0, LAYOUT))
    target = gl.expand_dims(m.to(gl.int64) * width, 1) + gl.expand_dims(n, 0)
    gl.store(y + target, result, gl.expand_dims(m < num_rows, 1) & gl.expand_dims(n < width, 0))


@gluon.jit
def _activated(gate, up, smoother, out_scale, column, width, SMOOTH: gl.constexpr, DTYPE: gl.constexpr):
    """silu(gate) * up as silu.py and store_row.py make it: rounded to DTYPE, smoothed, in int8 of one scale.

    gate, up: float32, which are rounded to DTYPE first
    """
    gate, up = gate.to(DTYPE).to(gl.float32), up.to(DTYPE).to(gl.float32)
    value = (gate / (1.0 + gl.exp(-gate)) * up).to(DTYPE).to(gl.float32)
    if SMOOTH:
        n = column + gl.arange(0, gate.shape[1], gl.SliceLayout(0, gate.type.layout))
        divisor = gl.load(smoother + n, n < width, other=1.0)
        value = quotient(value, gl.expand_dims(divisor, 0), gl.expand_dims(gl.div_rn(1.0, divisor), 0))
    scale = gl.load(out_scale)
    limit = scale * 127.0
    q = quotient(gl.minimum(gl.maximum(value, -limit), limit), scale, gl.div_rn(1.0, scale))
    return integer(q).to(gl.int8)


@gluon.jit
def _gemm_int8(
    x, first_weight, second_weight, x_scale, scale, smoother, out_scale,
    num_rows, in_features, out_features,
    y,
    GATED: gl.constexpr, SMOOTH: gl.constexpr, ROW_SCALES: gl.constexpr, DTYPE: gl.constexpr, SPLIT: gl.constexpr,
    BLOCK_M: gl.constexpr, FIRST: gl.constexpr, SECOND: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
    BAND: gl.constexpr, FIRST_SUMS: gl.constexpr, SECOND_SUMS: gl.constexpr, FIRST_ROWS: gl.constexpr,
    SECOND_ROWS: gl.constexpr, OVERLAP: gl.constexpr,
):  # fmt: skip
    """x, the weights: descriptors of blocks of x's rows and of each run's; _SUMS, _ROWS: layouts of a run of y as the
    tensor cores leave it and as it is stored; DTYPE: of the numbers, which a gated y has in int8.  SPLIT: y points to
    the parts of gemm_parts.py
    """
    if OVERLAP:
        gdc_launch_dependents()
    width = out_features // 2 if GATED else out_features  # channels of y
    CHANNELS: gl.constexpr = FIRST if GATED else FIRST + SECOND  # channels of y for one program
    blocks_m, blocks_n = gl.cdiv(num_rows, BLOCK_M), gl.cdiv(width, CHANNELS)
    band = gl.program_id(0) // (BAND * blocks_n)
    band_height = gl.minimum(blocks_m - band * BAND, BAND)
    place = gl.program_id(0) % (BAND * blocks_n)
    row, column = (band * BAND + place % band_height) * BLOCK_M, (place // band_height) * CHANNELS
    second_column = column + width if GATED else column + FIRST

    x_blocks = gl.allocate_shared_memory(gl.int8, [STAGES, BLOCK_M, BLOCK_K], x.layout)
    first_blocks = gl.allocate_shared_memory(gl.int8, [STAGES, FIRST, BLOCK_K], first_weight.layout)
    if SECOND:
        second_blocks = gl.allocate_shared_memory(gl.int8, [STAGES, SECOND, BLOCK_K], second_weight.layout)
    loaded = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(loaded.index(i), count=1)
    fence_async_shared()
    STAGE_BYTES: gl.constexpr = (BLOCK_M + FIRST + SECOND) * BLOCK_K
    begin, end = share(in_features, BLOCK_K)
    steps = gl.cdiv(end - begin, BLOCK_K)
    for i in gl.static_range(STAGES - 1):  # the weight does not depend on the kernel before
        more, k, barrier = i < steps, begin + i * BLOCK_K, loaded.index(i)
        mbarrier.expect(barrier, STAGE_BYTES, pred=more)
        load_block(first_weight, [column, k], barrier, first_blocks.index(i), pred=more)
        if SECOND:
            load_block(second_weight, [second_column, k], barrier, second_blocks.index(i), pred=more)
    if OVERLAP:
        gdc_wait()
    for i in gl.static_range(STAGES - 1):
        load_block(x, [row, begin + i * BLOCK_K], loaded.index(i), x_blocks.index(i), pred=i < steps)

    first = gl.zeros((BLOCK_M, FIRST), gl.int32, FIRST_SUMS)
    if SECOND:
        second = gl.zeros((BLOCK_M, SECOND), gl.int32, SECOND_SUMS)
    for step in range(steps):
        stage = step % STAGES
        mbarrier.wait(loaded.index(stage), (step // STAGES) & 1)
        first = warpgroup_mma(x_blocks.index(stage), first_blocks.index(stage).permute((1, 0)), first, is_async=True)
        if SECOND:
            second = warpgroup_mma(
                x_blocks.index(stage), second_blocks.index(stage).permute((1, 0)), second, is_async=True
            )
            first, second = warpgroup_mma_wait(2, deps=(first, second))
        else:
            first = warpgroup_mma_wait(1, deps=(first,))
        ahead = step + STAGES - 1  # goes where the step before, which has been waited for, was read from
        free, next_k, is_there = ahead % STAGES, begin + ahead * BLOCK_K, ahead < steps
        mbarrier.expect(loaded.index(free), STAGE_BYTES, pred=is_there)
        load_block(x, [row, next_k], loaded.index(free), x_blocks.index(free), pred=is_there)
        load_block(first_weight, [column, next_k], loaded.index(free), first_blocks.index(free), pred=is_there)
        if SECOND:
            load_block(
                second_weight, [second_column, next_k], loaded.index(free), second_blocks.index(free), pred=is_there
            )
    if SECOND:
        first, second = warpgroup_mma_wait(0, deps=(first, second))
    else:
        first = warpgroup_mma_wait(0, deps=(first,))

    if SPLIT:
        part = y + gl.program_id(1).to(gl.int64) * num_rows * width
        _store(first, row, column, num_rows, width, part, FIRST_ROWS)
        if SECOND:
            _store(second, row, second_column, num_rows, width, part, SECOND_ROWS)
    else:
        result = _scaled(first, x_scale, scale, row, column, num_rows, width, ROW_SCALES)
        if GATED:
            up = _scaled(second, x_scale, scale, row, second_column, num_rows, out_features, ROW_SCALES)
            activated = _activated(result, up, smoother, out_scale, column, width, SMOOTH, DTYPE)
            _store(activated, row, column, num_rows, width, y, FIRST_ROWS)
        else:
            _store(result.to(DTYPE), row, column, num_rows, width, y, FIRST_ROWS)
            if SECOND:
                result = _scaled(second, x_scale, scale, row, second_column, num_rows, width, ROW_SCALES)
                _store(result.to(DTYPE), row, second_column, num_rows, width, y, SECOND_ROWS)


def block_layout(rows: int, block_k: int) -> gl.NVMMASharedLayout:
    """How a block of int8 lies in shared memory."""
    return gl.NVMMASharedLayout.get_default_for([rows, block_k], gl.int8)


def blocks_of(tile: RunsTile) -> tuple[int, int, int]:
    """Rows of a block of x and of each run's weights; without a second run, its descriptor is the first one's."""
    return tile.block_m, tile.first, tile.second or tile.first


def constants(tile: RunsTile, dtype: torch.dtype, gated: bool) -> dict[str, object]:
    """The kernel's constants that the tile and the types decide."""
    _, first, second = blocks_of(tile)
    piece = 16 if gated else 8 if tile.splits == 1 else 4  # numbers that a thread stores at a time

    def sums(channels: int) -> gl.NVMMADistributedLayout:
        return gl.NVMMADistributedLayout([3, 0], [tile.num_warps, 1], [16, channels, 32])

    def rows(channels: int) -> gl.BlockedLayout:
        threads = min(channels // piece, 32)
        return gl.BlockedLayout([1, piece], [32 // threads, threads], [tile.num_warps, 1], [1, 0])

    return {
        "GATED": gated,
        "DTYPE": GL_TYPES[dtype],
        "SPLIT": tile.splits > 1,
        "BLOCK_M": tile.block_m,
        "FIRST": tile.first,
        "SECOND": tile.second,
        "BLOCK_K": tile.block_k,
        "STAGES": tile.num_stages,
        "BAND": BAND,
        "FIRST_SUMS": sums(first),
        "SECOND_SUMS": sums(second),
        "FIRST_ROWS": rows(first),
        "SECOND_ROWS": rows(second),
    }


def gemm_int8(
    x: Operand, weight: Tensor, scale: Tensor, out_dtype: torch.dtype, tile: RunsTile | None = None
) -> Tensor:
    """y = (x @ weightᵀ) * x.scale * scale, the same bits as gemm.gemm's.

    x: [num_tokens, in_features] int8 with its scale; weight: [out_features, in_features] int8; scale: [out_features]
    float32; in_features: a multiple of 16; tile: None = what measured fastest -> [num_tokens, out_features]
    """
    num_rows, out_features = x.values.shape[0], weight.shape[0]
    tile = tile or choose_runs_tile(num_rows, weight.shape[1], out_features, processors(weight.device))
    if tile.splits > 1:
        parts = torch.empty(tile.splits, num_rows, out_features, dtype=torch.int32, device=weight.device)
        _launch(tile, x, weight, scale, None, parts, out_dtype)
        return scale_sums(parts, x.scaled[1], scale, out_dtype)
    y = torch.empty(num_rows, out_features, dtype=out_dtype, device=weight.device)
    _launch(tile, x, weight, scale, None, y, out_dtype)
    return y


def gated_int8(x: Operand, weight: Tensor, scale: Tensor, form: StaticScale, dtype: torch.dtype) -> Operand:
    """silu.silu_mul(y, form) of gemm_int8's y in the dtype, the same bits.

    form: of int8 with one scale -> [num_tokens, out_features / 2]
    """
    y = Operand.allocate(form, x.values, x.values.shape[0], weight.shape[0] // 2)
    _launch(TILE_256, x, weight, scale, form, y.values, dtype)
    return y


def _launch(
    tile: RunsTile, x: Operand, weight: Tensor, scale: Tensor, form: StaticScale | None, y: Tensor, dtype: torch.dtype
) -> None:
    """form: what a gated y is quantised to; y: the result, or the parts of a tile with splits"""
    values, x_scale = x.scaled
    num_rows, in_features = values.shape
    blocks = [
        TensorDescriptor.from_tensor(matrix, [rows, tile.block_k], block_layout(rows, tile.block_k))
        for matrix, rows in zip((values, weight, weight), blocks_of(tile), strict=True)
    ]
    smoother = form.smoother if form else None
    overlap = overlaps(weight.device)
    tiles = cdiv(num_rows, tile.block_m) * cdiv(y.shape[-1], tile.first + (0 if form else tile.second))
    _gemm_int8[(tiles, tile.splits)](
        *blocks,
        x_scale,
        scale,
        scale if smoother is None else smoother,
        form.scale if form else scale,
        num_rows,
        in_features,
        weight.shape[0],
        y,
        SMOOTH=smoother is not None,
        ROW_SCALES=x_scale.numel() > 1,
        **constants(tile, dtype, form is not None),
        OVERLAP=overlap,
        num_warps=tile.num_warps,
        enable_fp_fusion=True,
        **({"launch_pdl": True} if overlap else {}),
    )
