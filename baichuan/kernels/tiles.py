"""How the products of several tokens are cut up among programs, and what measures fastest."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

from baichuan.kernels.primitives import prefetch
from baichuan.kernels.spec import cdiv


@dataclass(frozen=True)
class Tile:
    """A program computes block_m rows of x times block_n output channels, block_k input channels at a time."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int  # blocks of x and of the weight that are in flight or in use
    max_programs: int = 264  # splitting goes no further than this; a GPU runs about as many at once
    splits: int = 1  # programs that share the input channels of one tile (gemm_parts.py)


PREFETCHED_LINES = tl.constexpr(4)  # lines of 128 bytes, of each row of a tile's weights
BAND = tl.constexpr(8)  # blocks of rows in a band of place_of_tile


@triton.jit
def place_of_tile(num_rows, out_features, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(block of rows, block of output channels) of this program.

    Programs are numbered down the columns of bands of BAND blocks of rows, so that those that run at the same time
    share rows of x and of the weight in the L2 cache.  With BAND = 2, for 4 blocks of rows and 3 of output channels:

         0  2  4
         1  3  5
         6  8 10
         7  9 11
    """
    blocks_m, blocks_n = tl.cdiv(num_rows, BLOCK_M), tl.cdiv(out_features, BLOCK_N)
    band = tl.program_id(0) // (BAND * blocks_n)
    band_height = tl.minimum(blocks_m - band * BAND, BAND)
    place = tl.program_id(0) % (BAND * blocks_n)
    return band * BAND + place % band_height, place // band_height


@triton.jit
def prefetch_weight(rows, first, width):
    """Bring the beginning of a tile's weights into the L2 cache, while the kernel before may still compute x.

    rows: pointers [BLOCK_N, 1] to rows of `width` numbers, which the program reads from number `first` on
    """
    LINE: tl.constexpr = 1024 // rows.dtype.element_ty.primitive_bitwidth
    columns = first + tl.arange(0, PREFETCHED_LINES) * LINE
    prefetch(rows + tl.minimum(columns, width - 1)[None, :])


@triton.jit
def share_of_split(in_features, BLOCK_K: tl.constexpr):
    """(first, end) of the input channels of this program's split."""
    share = tl.cdiv(tl.cdiv(in_features, BLOCK_K), tl.num_programs(1)) * BLOCK_K
    first = tl.program_id(1) * share
    return first, tl.minimum(first + share, in_features)


# What measures fastest on an H200: (most rows of x, tile), None for any number.  With few rows the time goes into
# reading the weights, with many into the tensor cores.  "bytes": x and weight both have 8 bits; "converted": an integer
# weight becomes x's float type; "dense": both have a 16-bit float type.  int4_kind says which products take "int4_..."
# in place of "converted", dense_kind which take "narrow" in place of "dense".
TILES = {
    "bytes": (
        (8, Tile(8, 64, 256, 4, 4)),
        (16, Tile(16, 64, 256, 4, 4)),
        (32, Tile(32, 64, 256, 4, 4)),
        (64, Tile(64, 64, 128, 4, 5)),
        (128, Tile(128, 128, 128, 8, 5, 132)),
        (None, Tile(128, 128, 128, 8, 3)),
    ),
    "converted": (
        (8, Tile(8, 64, 256, 2, 3, 528)),
        (16, Tile(16, 64, 256, 2, 3, 528)),
        (32, Tile(32, 64, 128, 2, 3, 528)),
        (64, Tile(64, 128, 128, 8, 3)),
        (None, Tile(128, 64, 128, 4, 3)),
    ),
    "int4_g32": ((64, Tile(64, 64, 128, 4, 4)),),
    "int4_g32_one_wave": ((64, Tile(64, 64, 128, 4, 3, 132)),),
    "int4_g64": ((64, Tile(64, 64, 256, 4, 3)),),
    "int4_g128": ((64, Tile(64, 64, 256, 4, 3)),),
    "int4_g32_zeros": ((64, Tile(64, 128, 64, 8, 4)),),
    "int4_g64_zeros": ((64, Tile(64, 128, 128, 8, 3)),),
    "int4_g128_zeros": ((64, Tile(64, 64, 256, 4, 3)),),
    "dense": (
        (8, Tile(8, 64, 256, 4, 4)),
        (16, Tile(16, 64, 128, 4, 5, 132)),
        (32, Tile(32, 128, 128, 4, 4, 132)),
        (64, Tile(64, 128, 64, 4, 6, 132)),
        (None, Tile(128, 128, 64, 8, 4, 132)),
    ),
    "narrow": ((64, Tile(64, 64, 128, 4, 5, 132)),),
    "float32": ((None, Tile(16, 32, 64, 4, 2)),),
}
NARROW = 7680  # channels
ONE_WAVE = (264, 396)  # programs of 64 x 64 x 128 in four and in three stages that 132 multiprocessors run at once
MIN_STEPS = 4  # a split has at least this many blocks of input channels; only the last may have fewer


def dense_kind(num_rows: int, in_features: int, out_features: int) -> str:
    """Small matrices, such as a rank has, of 33 to 64 rows are "narrow": such tiles fill the GPU without splits."""
    return "narrow" if 32 < num_rows <= 64 and max(in_features, out_features) <= NARROW else "dense"


def int4_kind(num_rows: int, out_features: int, group_size: int, zeros: bool) -> str:
    """Groups of 32, 64 and 128 channels, with and without zeros, have a kind each for 33 to 64 rows.

    With a stage less a GPU runs ONE_WAVE[1] programs of groups of 32 at once instead of ONE_WAVE[0].
    """
    kind = f"int4_g{group_size}_zeros" if zeros else f"int4_g{group_size}"
    if not 32 < num_rows <= 64 or kind not in TILES:
        return "converted"
    (_, tile), *_ = TILES["int4_g32"]
    fewer, more = ONE_WAVE
    return "int4_g32_one_wave" if kind == "int4_g32" and fewer < cdiv(out_features, tile.block_n) <= more else kind


def choose_tile(
    num_rows: int,
    in_features: int,
    out_features: int,
    x_dtype: torch.dtype,
    weight_dtype: torch.dtype,
    groups: tuple[int, bool] | None = None,
) -> Tile:
    """The table's tile for num_rows rows of x (operand.Int16 has two for each token), with its splits.

    groups: of a weight of 4 bits (channels in a group, whether groups have zeros)
    """
    if x_dtype == torch.float32:
        kind = "float32"
    elif x_dtype == weight_dtype:
        kind = "bytes" if x_dtype.itemsize == 1 else dense_kind(num_rows, in_features, out_features)
    else:
        kind = int4_kind(num_rows, out_features, *groups) if groups else "converted"
    tile = next(tile for limit, tile in TILES[kind] if limit is None or num_rows <= limit)
    return split(tile, num_rows, in_features, out_features)


def split(tile: Tile, num_rows: int, in_features: int, out_features: int) -> Tile:
    """The tile with as many splits as max_programs and MIN_STEPS allow; no split is empty."""
    programs, steps = cdiv(num_rows, tile.block_m) * cdiv(out_features, tile.block_n), cdiv(in_features, tile.block_k)
    splits = max(min(tile.max_programs // programs, steps // MIN_STEPS), 1)
    return replace(tile, splits=cdiv(steps, cdiv(steps, splits)))


@dataclass(frozen=True)
class RunsTile:
    """What Tile is, for gemm_int8.py: block_m rows of x times one or two runs of neighbouring output channels."""

    block_m: int  # 64 for every four warps, or a multiple
    first: int  # channels of the first run, at most 128: Triton has no wider instructions for integers
    second: int  # channels of the second run; 0 = there is none
    block_k: int
    num_warps: int
    num_stages: int
    programs: int  # programs that a multiprocessor runs at a time
    splits: int = 1  # programs that share the input channels of one tile (gemm_parts.py)


# What measures fastest on an H200 (docs/performance.md).
TILE_128, TILE_160 = RunsTile(128, 128, 0, 128, 4, 3, 2), RunsTile(128, 128, 32, 128, 4, 3, 2)
TILE_256 = RunsTile(128, 128, 128, 128, 8, 4, 1)  # with a gate and its up as runs, too, where y is activated
LARGE_ROWS = 2048  # more rows take TILE_256, as many or fewer TILE_128 or TILE_160, if they are not few
# Few rows, which are one block, by their largest number: tiles in order of their width, and the one of a matrix that
# has more input than output channels.
FEW_ROWS = (
    (64, (RunsTile(64, 64, 0, 128, 4, 6, 2),), RunsTile(64, 128, 0, 128, 4, 6, 1, splits=3)),
    (
        128,
        (RunsTile(128, 64, 0, 128, 4, 6, 1), RunsTile(128, 128, 0, 128, 4, 5, 1), TILE_256),
        RunsTile(128, 128, 0, 128, 8, 6, 1, splits=3),
    ),
)


def choose_runs_tile(num_rows: int, in_features: int, out_features: int, num_processors: int) -> RunsTile:
    """The tile of a matrix [out_features, in_features].

    Few rows take a tile with splits where in_features is the larger, else the narrowest whose programs all run at once,
    or the widest.  Up to LARGE_ROWS rows take the one of two tiles whose waves, of as many programs as run at once,
    take less.
    """
    if num_rows > LARGE_ROWS:
        return TILE_256

    def waves(tile: RunsTile) -> int:
        programs = cdiv(num_rows, tile.block_m) * cdiv(out_features, tile.first + tile.second)
        return cdiv(programs, tile.programs * num_processors)

    for most, tiles, split_tile in FEW_ROWS:
        if num_rows <= most:
            return split_tile if in_features > out_features else next((t for t in tiles if waves(t) == 1), tiles[-1])
    return min(TILE_128, TILE_160, key=lambda tile: waves(tile) * (tile.first + tile.second))
