"""One token times a matrix of 8-bit or 4-bit integers, the token being integers too.

Sums of integer products are exact, and one instruction, dp4a, adds four of them: a fraction of the work of turning the
weights into floats.  The token comes as one int8 row (SmoothQuant) or as operand.Int16, two rows of int8.  These are
the DIGITS of its numbers to base 256, and every digit is summed by itself:

    y = x_scale * sum_groups scale * (256 * sum(high * w) + sum(low * w))      int32 sums, float32 from there on

Weights are read as 32-bit words, each of four bytes.  A byte of 4-bit weights holds an even channel in its low nibble
and the odd one after it in its high nibble.  Each nibble is moved to the upper half of a byte, where it counts 16 times
its signed value; the factor 1 / 16 is applied at the end.  A word then meets two words of a deinterleaved token:

    word of weights      w7 w6 | w5 w4 | w3 w2 | w1 w0
    (word << 4) & F0..   w6 .  | w4 .  | w2 .  | w0 .       dp4a with the word  x6 x4 x2 x0  of even channels
     word       & F0..   w7 .  | w5 .  | w3 .  | w1 .       dp4a with the word  x7 x5 x3 x1  of odd channels

Where groups have a zero, y = x_scale * sum_groups scale * (sum(w * x) - zero * sum(x)): the token's own sums come with
it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from baichuan.kernels.operand import Operand
from baichuan.kernels.peers import Slots, as_bits, constants_of, send_to_peers, slots_at_peers
from baichuan.kernels.primitives import INTERPRETED, prefetch_beginning, start_dependents, wait_for_inputs
from baichuan.kernels.silu import gated
from baichuan.kernels.spec import GemvBlock, KernelSpec, cdiv

# A thread reads 16 bytes of a row at a time: in_features is a multiple of BYTE_CHANNELS, and a group of 4-bit weights
# one of NIBBLE_CHANNELS.
BYTE_CHANNELS, NIBBLE_CHANNELS = 16, 32


@triton.jit
def _add_dot4(acc, a, b):
    """acc + a0 * b0 + a1 * b1 + a2 * b2 + a3 * b3 for the four signed bytes of the words a and b, in int32."""
    if INTERPRETED:
        for byte in tl.static_range(4):
            acc += ((a << (24 - 8 * byte)) >> 24) * ((b << (24 - 8 * byte)) >> 24)
        return acc
    return tl.inline_asm_elementwise(
        "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, acc], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def _zeros(BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DIGITS: tl.constexpr):
    """A sum for each digit."""
    sums = ()
    for _ in tl.static_range(DIGITS):
        sums = sums + (tl.zeros((BLOCK_N, BLOCK_K), tl.int32),)
    return sums


@triton.jit
def _add_words(sums, w, x_words, DIGITS: tl.constexpr, INT4: tl.constexpr):
    """Each digit's sums with the products of the weights in w and the digit's words of the token.

    sums: [BLOCK_N, BLOCK_K] int32 for each digit; w: [BLOCK_N, BLOCK_K] words;
    x_words: [BLOCK_K] for each digit or, with INT4, for each digit's even channels and then its odd ones
    """
    result = ()
    for digit in tl.static_range(DIGITS):
        if INT4:
            acc = _add_dot4(sums[digit], (w << 4) & -0x0F0F0F10, x_words[2 * digit][None, :])
            acc = _add_dot4(acc, w & -0x0F0F0F10, x_words[2 * digit + 1][None, :])
        else:
            acc = _add_dot4(sums[digit], w, x_words[digit][None, :])
        result = result + (acc,)
    return result


@triton.jit
def _as_float(digits, DIGITS: tl.constexpr):
    """The number of these digits to base 256, the highest one first."""
    number = digits[0].to(tl.float32)
    for digit in tl.static_range(1, DIGITS):
        number = 256.0 * number + digits[digit].to(tl.float32)
    return number


@triton.jit
def _of_groups(numbers, k, words, WORDS_PER_GROUP: tl.constexpr, BLOCK_K: tl.constexpr):
    """The number of every four words' group, from word k on, and 0 beyond the row: [..., BLOCK_K / 4].

    A group is a multiple of four words.  numbers: pointer to the first one, or pointers [BLOCK_N, 1] to each row's
    """
    four = k // 4 + tl.arange(0, BLOCK_K // 4)
    places = numbers + (four // (WORDS_PER_GROUP // 4))[None, :]
    # multiple_of says that neighbours need not lie aligned, so that each thread loads the numbers that it needs itself:
    # one that loaded several at once would have to pass some on through shared memory, with two barriers a block.
    return tl.load(tl.multiple_of(places, (1, 1)), (four < words // 4)[None, :], other=0)


@triton.jit
def _load_block(weight, scale, zero, row, k, words, WORDS_PER_GROUP: tl.constexpr, ZERO: tl.constexpr,
                BLOCK_K: tl.constexpr):  # fmt: skip
    """Words of these rows from word k on, [BLOCK_N, BLOCK_K]; with groups also scales, and zeros, of every four."""
    # Written so that the compiler unrolls the loop of 8-bit weights.  Beyond the row's end a word may be anything,
    # because x is 0 there.
    columns = k - BLOCK_K + tl.arange(0, BLOCK_K) + BLOCK_K
    block = (tl.load((weight + row * words)[:, None] + columns[None, :], (columns < words)[None, :]),)
    if WORDS_PER_GROUP > 0:
        group = row * (words // WORDS_PER_GROUP)
        block = block + (_of_groups((scale + group)[:, None], k, words, WORDS_PER_GROUP, BLOCK_K),)
        if ZERO:
            block = block + (_of_groups((zero + group)[:, None], k, words, WORDS_PER_GROUP, BLOCK_K),)
    return block


@triton.jit
def _row_sums(sums, DIGITS: tl.constexpr):
    """The sums of whole rows, without a scale: [BLOCK_N] float32."""
    rows = ()
    for digit in tl.static_range(DIGITS):
        rows = rows + (tl.sum(sums[digit], 1),)
    return _as_float(rows, DIGITS)


@triton.jit
def _add_block(sums, total, block, x_words, x_sums, GROUPED: tl.constexpr, ZERO: tl.constexpr, INT4: tl.constexpr,
               BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DIGITS: tl.constexpr):  # fmt: skip
    """(sums, total) with one block of _load_block more: without groups in sums, [BLOCK_N, BLOCK_K] for each digit.

    With groups in total, [BLOCK_N, BLOCK_K / 4]: sums of four words, less what zeros take off, times the group's scale.
    x_sums: with ZERO every four words' part in the sum of the token over their group, [1, BLOCK_K / 4] float32
    """
    if GROUPED:
        part, fours = _add_words(_zeros(BLOCK_N, BLOCK_K, DIGITS), block[0], x_words, DIGITS, INT4), ()
        for digit in tl.static_range(DIGITS):
            fours = fours + (tl.sum(tl.reshape(part[digit], (BLOCK_N, BLOCK_K // 4, 4)), 2),)
        four = _as_float(fours, DIGITS)
        if ZERO:
            four -= block[2].to(tl.float32) * x_sums
        total += four * block[1].to(tl.float32)
    else:
        sums = _add_words(sums, block[0], x_words, DIGITS, INT4)
    return sums, total


@triton.jit
def _gemv_int(
    x, x_scale, weight, scale, zero, distances,
    chunks, out_features,
    y, inbox,
    DIGITS: tl.constexpr, INT4: tl.constexpr, WORDS_PER_GROUP: tl.constexpr, ZERO: tl.constexpr, GATED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    RANK: tl.constexpr, WORLD_SIZE: tl.constexpr, SLOT_BYTES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    start_dependents(OVERLAP)
    words = chunks * 4  # words of a row; the compiler sees that they are a multiple of four
    GROUPED: tl.constexpr = WORDS_PER_GROUP > 0
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < out_features
    row = tl.minimum(n, out_features - 1).to(tl.int64)  # beyond the last row that one again
    columns = tl.arange(0, BLOCK_K)
    groups = words // WORDS_PER_GROUP if GROUPED else 1
    block = _load_block(weight, scale, zero, row, 0, words, WORDS_PER_GROUP, ZERO, BLOCK_K)
    sums, total = _zeros(BLOCK_N, BLOCK_K, DIGITS), tl.zeros((BLOCK_N, BLOCK_K // 4), tl.float32)
    row_scale, row_zero = 1.0, 0.0
    if not GROUPED:
        row_scale = tl.load(scale + n, inside, other=0.0).to(tl.float32)
        row_zero = tl.load(zero + row).to(tl.float32) if ZERO else 0.0
    if GATED:
        up_weight = weight + out_features.to(tl.int64) * words
        up_scales = scale + out_features.to(tl.int64) * groups
        up_zeros = zero + out_features.to(tl.int64) * groups
        up_block = _load_block(up_weight, up_scales, up_zeros, row, 0, words, WORDS_PER_GROUP, ZERO, BLOCK_K)
        up_sums, up_total = sums, total
        up_scale, up_zero = 1.0, 0.0
        if not GROUPED:
            up_scale = tl.load(up_scales + n, inside, other=0.0).to(tl.float32)
            if ZERO:
                up_zero = tl.load(up_zeros + row).to(tl.float32)
    if DIGITS == 2 and not INT4:  # the others measure slower with a prefetch
        prefetch_beginning(weight, out_features.to(tl.int64) * words, GATED, OVERLAP)
    if WORLD_SIZE > 1:
        targets = slots_at_peers(inbox, distances, RANK, WORLD_SIZE, SLOT_BYTES, y.dtype.element_ty)
    wait_for_inputs(OVERLAP)
    if DIGITS == 2:  # the loop of W8A8 measures slower with one number more to keep
        factor = tl.load(x_scale)
    for start in range(0, words, BLOCK_K):
        k = start + columns
        x_words, x_sums = (), 0.0
        for number in tl.static_range(DIGITS * (2 if INT4 else 1)):
            x_words = x_words + (tl.load(x + number * words + k, k < words, other=0),)
        if ZERO and GROUPED:
            x_sums = _of_groups(x_scale + 1, start, words, WORDS_PER_GROUP, BLOCK_K) * (4 / WORDS_PER_GROUP)
        current = block  # the next one is on its way while the sums take this one
        block = _load_block(weight, scale, zero, row, start + BLOCK_K, words, WORDS_PER_GROUP, ZERO, BLOCK_K)
        sums, total = _add_block(sums, total, current, x_words, x_sums, GROUPED, ZERO, INT4,
                                 BLOCK_N, BLOCK_K, DIGITS)  # fmt: skip
        if GATED:
            current = up_block
            up_block = _load_block(
                up_weight, up_scales, up_zeros, row, start + BLOCK_K, words, WORDS_PER_GROUP, ZERO, BLOCK_K
            )
            up_sums, up_total = _add_block(up_sums, up_total, current, x_words, x_sums, GROUPED, ZERO, INT4,
                                           BLOCK_N, BLOCK_K, DIGITS)  # fmt: skip
    if DIGITS == 1:
        factor = tl.load(x_scale)
    if INT4:
        factor *= 0.0625
    x_sum = tl.load(x_scale + 1) if ZERO and not GROUPED else 0.0
    result = tl.sum(total, 1) if GROUPED else (_row_sums(sums, DIGITS) - row_zero * x_sum) * row_scale
    if GATED:
        up = tl.sum(up_total, 1) if GROUPED else (_row_sums(up_sums, DIGITS) - up_zero * x_sum) * up_scale
        result = gated(result * factor, up * factor, y.dtype.element_ty)
    else:
        result *= factor
    result = result.to(y.dtype.element_ty)
    tl.store(y + n, result, inside)
    if WORLD_SIZE > 1:
        send_to_peers(targets, n, as_bits(result), inside, RANK, WORLD_SIZE)


GEMV_INT = KernelSpec(
    _gemv_int, ("x", "x_scale", "weight", "scale", "zero", "distances"), ("chunks", "out_features"), ("y", "inbox")
)


# What measures fastest on an H200, by the matrix's shape and the integers: weights and token of one byte (w8a8), or an
# operand.Int16 token and weights of 8 or 4 bits.
BLOCKS = {
    "gated": {"w8a8": GemvBlock(1, 512, 4), "int8": GemvBlock(1, 256, 2), "int4": GemvBlock(2, 128, 1)},
    "tall": {"w8a8": GemvBlock(4, 1024, 8), "int8": GemvBlock(2, 256, 2), "int4": GemvBlock(4, 128, 2)},
    "wide": {"w8a8": GemvBlock(2, 1024, 4), "int8": GemvBlock(2, 512, 4), "int4": GemvBlock(4, 256, 2)},
    "square": {"w8a8": GemvBlock(4, 1024, 8), "int8": GemvBlock(2, 256, 2), "int4": GemvBlock(4, 128, 2)},
}


def choose_block(in_features: int, out_features: int, kind: str, gated: bool) -> GemvBlock:
    """The table's block.  out_features: of the result, half the matrix's if gated; kind: w8a8, int8 or int4"""
    if gated:
        shape = "gated"
    elif out_features >= 2 * in_features:
        shape = "tall"
    else:
        shape = "wide" if in_features >= 2 * out_features else "square"
    return BLOCKS[shape][kind]


def gemv_int(
    x: Operand,
    weight: Tensor,
    scale: Tensor,
    out_dtype: torch.dtype,
    gated: bool = False,
    block: GemvBlock | None = None,
    zero: Tensor | None = None,
    slots: Slots | None = None,
) -> Tensor:
    """y = x @ W(weight, scale, zero)ᵀ for one token x and records.Int8Weight, Int4Weight or SmoothQuantWeight.

    x: [1, in_features] as int8 or Int16, for uint8 weights deinterleaved, with a zero also with its groups' sums;
    gated: silu(first half of y) * second half; weight: [out_features, in_features] int8, in_features a multiple of 16,
    or [out_features, in_features / 2] uint8, each group a multiple of 32 channels; scale: [out_features], or
    [out_features, groups] for uint8; block: None = the table's; zero: None, or as scale for uint8;
    slots: y goes to them, too -> [1, out_features], or half of it if gated
    """
    int4 = weight.dtype == torch.uint8
    assert x.scale is not None
    digits = x.values.shape[0]
    out_features = weight.shape[0] // (2 if gated else 1)
    words = weight.shape[1] // 4
    groups = scale.shape[1] if int4 else 1
    kind = "int4" if int4 else "w8a8" if digits == 1 else "int8"
    block = block or choose_block(x.values.shape[1], out_features, kind, gated)
    y = torch.empty(1, out_features, dtype=out_dtype, device=weight.device)
    GEMV_INT.launch(
        (cdiv(out_features, block.block_n),),
        (
            x.values.view(torch.int32),
            x.scale,
            weight.view(torch.int32),
            scale,
            scale if zero is None else zero,
            slots.distances if slots else scale,
        ),
        (words // 4, out_features),
        (y, slots.inbox if slots else y),
        {
            "DIGITS": digits,
            "INT4": int4,
            "WORDS_PER_GROUP": 0 if groups == 1 else words // groups,
            "ZERO": zero is not None,
            "GATED": gated,
            "BLOCK_N": block.block_n,
            "BLOCK_K": block.block_k,
            **constants_of(slots),
        },
        num_warps=block.num_warps,
    )
    return y
