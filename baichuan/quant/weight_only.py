"""Weight-only quantisation: integers with one scale per output channel, or per group of input channels.

Every function works on whole rows, [n, in_features]: a row's scales depend on that row alone, so a matrix may come
in any blocks of rows and be cut into any columns afterwards, and the integers stay the same.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from baichuan.config import ModelConfig
from baichuan.errors import ConfigError
from baichuan.quant.scaled import divided, require_finite
from baichuan.records import Int4Weight, Int8Weight

GROUP_SIZES = (32, 64, 128)
INT4_MIN, INT4_MAX = -8, 7
TINY = 1e-30  # a group below this is all zeros: the inverse of its scale would overflow
CACHE_ELEMENTS = 1 << 17  # a CPU's thread works on float32 blocks of this many elements, which stay in its cache

# Factors that the search tries, each row with the largest group size that it is for: a group's value of largest
# magnitude is mapped to -8 * factor.  A factor above 1 clips that value, which suits long groups.  Other factors never
# won on normal or heavy-tailed weights.
CLIPPING = (
    (64, (0.9, 0.98, 1.05, 1.15)),
    (128, (0.9, 0.98, 1.05, 1.15, 1.3)),
    (None, (1.05, 1.15, 1.3, 1.5, 1.8, 2.25, 3.0)),
)
SHORT_GROUP = 128  # float32 sums exactly up to this many products of 4-bit integers and 11-bit significands


def quantise_int8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """scale = max|row| / 127,  q = round(row / scale).

    rows: [n, in_features] of any floating type -> q [n, in_features] int8, scale [n] float32.
    Raises CheckpointError for a NaN or an infinity.
    """
    q = torch.empty(rows.shape, dtype=torch.int8, device=rows.device)
    scale = torch.empty(rows.shape[0], dtype=torch.float32, device=rows.device)
    for block in _cache_blocks(rows):
        w = rows[block].float()
        scale[block] = divided(require_finite(w.abs().amax(-1)), 127)
        q[block] = (w / torch.where(scale[block] > 0, scale[block], 1)[:, None]).round_().clamp_(-127, 127)
    return q, scale


def quantise_int4(rows: Tensor, group_size: int, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """q = clamp(round(row / scale), -8, 7) with the scale that the search below finds best for each group.

    rows: [n, in_features] of any floating type; group_size divides in_features, 0 stands for in_features.
    -> packed [n, in_features / 2] uint8, scale [n, in_features / group_size] in scale_dtype, of either sign.

    The search minimises the squared error |w - scale q|².  For given integers q the best scale is <w, q> / <q, q>,
    and it leaves |w|² - <w, q>² / <q, q>.  So each candidate (the group's largest value mapped to -8 times one of
    CLIPPING) gives integers, these give their best scale and error, and the best candidate is refined once more.
    The scale is rounded to scale_dtype before the final integers are taken.
    A GPU gives the same integers as the CPU: products of integers with 16-bit weights, and their sums over at most
    SHORT_GROUP channels, are exact in float32; longer sums are taken in float64.
    Raises CheckpointError for a NaN or an infinity, ConfigError where in_features is odd.
    """
    n, in_features = rows.shape
    if in_features % 2:
        raise ConfigError(f"{in_features} input channels cannot be packed in pairs; use int8 for this model")
    group_size = group_size or in_features
    scale = torch.empty(n, in_features // group_size, dtype=scale_dtype, device=rows.device)
    packed = torch.empty(n, in_features // 2, dtype=torch.uint8, device=rows.device)
    for block in _cache_blocks(rows):
        groups = rows[block].float().reshape(-1, group_size)
        best = _search_scale(groups).to(scale_dtype)
        scale[block] = best.view(-1, scale.shape[1])
        packed[block] = pack_int4(_round_int4(groups, best.float()).view(-1, in_features))
    return packed, scale


def pack_int4(q: Tensor) -> Tensor:
    """Two of [-8, 7] per byte, the even input channel in the low nibble: [n, in] of any type -> [n, in / 2] uint8."""
    even, odd = q.to(torch.int8).view(torch.uint8).unflatten(-1, (-1, 2)).unbind(-1)
    return (even & 0xF) | (odd << 4)


def unpack_int4(packed: Tensor) -> Tensor:
    """The inverse of pack_int4: [n, in / 2] uint8 -> [n, in] int8."""
    signed = packed.view(torch.int8)
    return torch.stack(((signed << 4) >> 4, signed >> 4), dim=-1).flatten(-2)  # shifting right keeps the sign


def dequantise(weight: Int8Weight | Int4Weight, rows: slice = slice(None), out: Tensor | None = None) -> Tensor:
    """The matrix that the weight stands for, or some rows of it, in `out` if given: [n, in_features] float32."""
    match weight:
        case Int8Weight(q, scale):
            return torch.mul(q[rows], scale[rows, None], out=out)
        case Int4Weight(packed, scale, zero):
            groups = (scale.shape[1], -1)
            q = unpack_int4(packed[rows]).unflatten(-1, groups)
            if zero is not None:
                q -= zero[rows, :, None]
            out = None if out is None else out.unflatten(-1, groups)
            return torch.mul(q, scale[rows, :, None].float(), out=out).flatten(-2)
        case _:
            raise TypeError(type(weight).__name__)


def check_group_size(group_size: int, in_features: int, name: str) -> None:
    """Raise ConfigError unless a rank's `in_features` input channels of the linear `name` divide into groups."""
    if in_features % 2:
        raise ConfigError(f"a rank holds {in_features} input channels of {name} and INT4 packs two per byte; use INT8")
    if in_features % (group_size or 1) == 0:
        return
    fitting = [size for size in GROUP_SIZES if size < group_size and in_features % size == 0]
    raise ConfigError(
        f"group size {group_size} does not divide the {in_features} input channels that a rank holds of {name}; "
        f"use --weight_only_group_size {max(fitting, default=0)}"
    )


def fitting_group_sizes(config: ModelConfig, tp_size: int) -> list[int]:
    """Which of GROUP_SIZES divide every linear's input channels, and of which each rank gets at least one; a
    rank's heads are whole groups too, while the ranks' shares of the MLP may differ."""
    widths = (config.hidden_size, config.hidden_size // tp_size, config.intermediate_size)
    return [
        size
        for size in GROUP_SIZES
        if all(width % size == 0 for width in widths) and config.intermediate_size // size >= tp_size
    ]


def _cache_blocks(rows: Tensor) -> Iterator[slice]:
    n, in_features = rows.shape
    step = n if rows.is_cuda else max(1, torch.get_num_threads() * CACHE_ELEMENTS // in_features)
    for start in range(0, n, step):
        yield slice(start, min(start + step, n))


def _search_scale(groups: Tensor) -> Tensor:  # [g, group_size] float32 -> [g, 1] float32
    top, bottom = groups.amax(-1, keepdim=True), groups.amin(-1, keepdim=True)
    largest = require_finite(torch.where(top >= -bottom, top, bottom))
    unit = torch.where(largest.abs() < TINY, 0, INT4_MIN / largest)  # 1 / scale without clipping
    size = groups.shape[1]
    factors = next(factors for limit, factors in CLIPPING if limit is None or size <= limit)
    w_q, q_q = torch.empty(2, len(factors), groups.shape[0], device=groups.device)
    q, products = torch.empty_like(groups), torch.empty_like(groups)
    ones = groups.new_ones(size)

    def consider(inverse_scale: Tensor, w_q: Tensor, q_q: Tensor) -> None:
        torch.mul(groups, inverse_scale, out=q).round_().clamp_(INT4_MIN, INT4_MAX)
        torch.mul(groups, q, out=products)
        if size <= SHORT_GROUP:
            torch.mv(products, ones, out=w_q)
        else:
            w_q.copy_(products.sum(-1, dtype=torch.float64))
        torch.mv(torch.mul(q, q, out=products), ones, out=q_q).clamp_(min=1)

    for index, factor in enumerate(factors):
        consider(unit * factor, w_q[index], q_q[index])
    gains = w_q * w_q / q_q
    best = gains.amax(0)
    scale = (w_q / q_q).where(gains == best, -torch.inf).amax(0)
    consider(torch.where(scale == 0, 0, 1 / scale)[:, None], w_q[0], q_q[0])
    return torch.where(w_q[0] * w_q[0] / q_q[0] > best, w_q[0] / q_q[0], scale)[:, None]


def _round_int4(groups: Tensor, scale: Tensor) -> Tensor:
    q = groups / torch.where(scale == 0, torch.inf, scale)
    return q.round_().clamp_(INT4_MIN, INT4_MAX)
