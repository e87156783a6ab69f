"""The records that travel between the parts: weights by type, one step's tokens, one layer's cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from baichuan.config import ModelConfig


class _Matrix:
    """What the weight types share.  Two weights are equal only if they are the same object."""

    weight: Tensor  # [out_features, in_features]

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)"""
        out_features, in_features = self.weight.shape
        return out_features, in_features


@dataclass(frozen=True, eq=False)
class DenseWeight(_Matrix):
    """y = x @ weightᵀ"""

    weight: Tensor  # [out_features, in_features] in the model's dtype


@dataclass(frozen=True, eq=False)
class Int8Weight(_Matrix):
    """y = (x @ weightᵀ) * scale: symmetric, one scale per output channel"""

    weight: Tensor  # [out_features, in_features] int8
    scale: Tensor  # [out_features] float32, dense weight ≈ weight * scale


@dataclass(frozen=True, eq=False)
class Int4Weight:
    """y = x @ ((unpack(packed) - zero) * scale)ᵀ: one scale, and where given one zero, per output channel and group"""

    packed: Tensor  # [out_features, in_features / 2] uint8, even input channel in the low nibble, two's complement
    scale: Tensor  # [out_features, in_features / group_size] in the model's dtype; one group = the whole row
    zero: Tensor | None = None  # int8, as scale, -16 to 16; None = symmetric

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)"""
        return self.packed.shape[0], 2 * self.packed.shape[1]

    @property
    def group_size(self) -> int:
        """Input channels that share a scale."""
        return self.shape[1] // self.scale.shape[1]


@dataclass(frozen=True, eq=False)
class SmoothQuantWeight(_Matrix):
    """y = (quantise(x / smoother) @ weightᵀ) * input_scale * scale, with int32 accumulation"""

    weight: Tensor  # [out_features, in_features] int8
    scale: Tensor  # [out_features] float32, smoothed weight ≈ weight * scale
    input_scale: Tensor | None = None  # [1] float32, smoothed input ≈ int8 * input_scale; None = absmax / 127 per token
    smoother: Tensor | None = None  # [in_features] float32; None where the preceding norm has absorbed it


@dataclass(frozen=True, eq=False)
class Fp8Weight(_Matrix):
    """y = (e4m3(x / input_scale) @ weightᵀ) * input_scale * scale, with input_scale of the tensor or of each token"""

    weight: Tensor  # [out_features, in_features] float8_e4m3fn
    scale: Tensor  # [out_features] float32, dense weight ≈ weight * scale
    input_scale: Tensor | None = None  # [1] float32, input ≈ e4m3 * input_scale; None = quant/fp8.py's, per token


Weight = DenseWeight | Int8Weight | Int4Weight | SmoothQuantWeight | Fp8Weight


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer of one rank."""

    input_norm: Tensor  # [hidden_size]
    qkv: Weight  # out = 3 * local heads * head_dim: all q, all k, all v
    o_proj: Weight  # in = local heads * head_dim
    post_norm: Tensor  # [hidden_size]
    gate_up: Weight  # out = 2 * local intermediate: all gate, all up
    down_proj: Weight  # in = local intermediate
    k_scale: Tensor | None = None  # [1] float32, k ≈ cached k * k_scale; None = the cache holds the dtype
    v_scale: Tensor | None = None  # [1] float32


@dataclass(frozen=True)
class ModelWeights:
    """One rank's weights of the whole model."""

    embedding: Tensor  # [vocab_size, hidden_size], whole on every rank
    layers: tuple[LayerWeights, ...]
    norm: Tensor  # [hidden_size]
    lm_head: Weight  # out = padded vocabulary / tp_size


@dataclass(frozen=True)
class AttentionSpec:
    """One rank's share of the attention heads, and their position encoding."""

    num_heads: int  # heads of this rank
    first_head: int  # global index of this rank's first head
    total_heads: int  # heads of all ranks: an ALiBi slope depends on the global head index
    head_dim: int
    rotary: bool  # RoPE, else ALiBi
    rope_theta: float = ModelConfig.rope_theta
    rope_factor: float = ModelConfig.rope_factor


@dataclass(frozen=True, eq=False)
class LayerCache:
    """One layer's KV cache: blocks of tokens, and which blocks each row has."""

    k: Tensor  # [blocks, num_heads, tokens_per_block, head_dim] in the dtype, int8 or float8_e4m3fn; contiguous
    v: Tensor  # as k
    tables: Tensor  # [rows, blocks_per_row] int32: row r keeps token t in block tables[r, t // tokens_per_block]
    k_scale: Tensor | None = None  # [1] float32, k ≈ cached k * k_scale
    v_scale: Tensor | None = None  # [1] float32

    @classmethod
    def whole_rows(
        cls,
        rows: int,
        capacity: int,
        spec: AttentionSpec,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        scales: tuple[Tensor | None, Tensor | None] = (None, None),
        tokens_per_block: int = 16,
    ) -> LayerCache:
        """A cache of zeros where each row of up to `capacity` tokens has blocks of its own."""
        per_row = -(-capacity // tokens_per_block)
        shape = (rows * per_row, spec.num_heads, tokens_per_block, spec.head_dim)
        tables = torch.arange(rows * per_row, dtype=torch.int32, device=device).view(rows, per_row)
        k, v = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        return cls(k, v, tables, *scales)

    @property
    def tokens_per_block(self) -> int:
        """A power of two."""
        return self.k.shape[2]

    def row(self, row: int, length: int) -> tuple[Tensor, Tensor]:
        """Copies of the first `length` keys and values of a row, each [num_heads, length, head_dim]."""
        blocks = self.tables[row, : -(-length // self.tokens_per_block)].long()
        k, v = (kept[blocks].transpose(0, 1).flatten(1, 2)[:, :length] for kept in (self.k, self.v))
        return k, v


@dataclass(frozen=True)
class Step:
    """The new tokens of every sequence, packed one sequence after another without padding.

    Sequence b is row b of the KV cache's tables.  Prefill, a chunk of a prompt and decode differ only in their lengths.
    """

    tokens: Tensor  # [num_tokens] int64
    positions: Tensor  # [num_tokens] int64, each token's place in its sequence
    cu_seqlens: Tensor  # [batch_size + 1] int32, sequence b's tokens are cu_seqlens[b] to cu_seqlens[b + 1]
    context_lengths: Tensor  # [batch_size] int32, tokens in the cache after this step
    output_rows: Tensor  # [num_outputs] int64, the tokens whose logits are wanted
    max_new_tokens: int  # no sequence adds more; 1 = decode, exactly one token per sequence
    max_context_length: int  # upper bound of context_lengths
    # How many of the first sequences add exactly one token each; batch_size = decode.  In a captured step this is an
    # upper bound, and num_singles, [1] int32, holds the number itself; a decode step needs no num_singles.
    singles: int = 0
    num_singles: Tensor | None = None

    @property
    def batch_size(self) -> int:
        return self.context_lengths.shape[0]

    @property
    def mixed(self) -> bool:
        """Whether chunks of prompts follow on single tokens."""
        return 0 < self.singles < self.batch_size

    @staticmethod
    def of(
        new_tokens: Sequence[Sequence[int]],
        past_lengths: Sequence[int] | None = None,
        all_outputs: bool = False,
        device: torch.device | str = "cpu",
    ) -> Step:
        """A step that appends new_tokens[b] to a sequence of past_lengths[b] tokens (0 by default).

        Logits are wanted for each sequence's last token, or for every token with all_outputs.  A sequence may have no
        new tokens while another has some; its logits are then meaningless.
        """
        lengths = [len(tokens) for tokens in new_tokens]
        past = list(past_lengths) if past_lengths is not None else [0] * len(lengths)
        contexts = [p + n for p, n in zip(past, lengths, strict=True)]
        starts = torch.tensor([0, *accumulate(lengths)])
        parts = (
            torch.tensor([token for tokens in new_tokens for token in tokens], dtype=torch.int64),
            torch.cat([torch.arange(p, c) for p, c in zip(past, contexts, strict=True)]),
            torch.arange(sum(lengths)) if all_outputs else (starts[1:] - 1).clamp_min(0),
            starts,
            torch.tensor(contexts),
            torch.tensor([leading_ones(lengths)]),
        )
        there = torch.cat(parts).to(device)  # in one copy: each waits for the GPU
        tokens, positions, outputs, starts, context_lengths, num_singles = there.split(
            [part.shape[0] for part in parts]
        )
        return Step(
            tokens=tokens,
            positions=positions,
            cu_seqlens=starts.int(),
            context_lengths=context_lengths.int(),
            output_rows=outputs.clone(),  # at an address of its own: for an odd one Triton would compile kernels anew
            max_new_tokens=max(lengths) if min(lengths) else max(lengths + [2]),  # not decode if one is empty
            max_context_length=max(contexts),
            singles=leading_ones(lengths),
            num_singles=num_singles.int(),
        )

    def next(self, tokens: Tensor, parents: Tensor | None = None) -> Step:
        """The decode step that follows: one token per sequence, tokens [batch_size] int64.

        With parents [batch_size] int64, sequence b continues sequence parents[b] (see executors.base.RowCache.reorder).
        Nothing is read back from the device.
        """
        lengths = self.context_lengths if parents is None else self.context_lengths[parents]
        if self.max_new_tokens == 1 and self.output_rows.shape == tokens.shape == self.tokens.shape:
            cu_seqlens, output_rows = self.cu_seqlens, self.output_rows  # one token each, as in this step
        else:
            rows = torch.arange(tokens.shape[0] + 1, device=tokens.device)
            cu_seqlens, output_rows = rows.int(), rows[:-1]
        return replace(
            self,
            tokens=tokens,
            positions=lengths.long(),
            cu_seqlens=cu_seqlens,
            context_lengths=lengths + 1,
            output_rows=output_rows,
            max_new_tokens=1,
            max_context_length=self.max_context_length + 1,
            singles=tokens.shape[0],
            num_singles=None,
        )


def leading_ones(lengths: Sequence[int]) -> int:
    """How many ones the lengths begin with."""
    return next((place for place, length in enumerate(lengths) if length != 1), len(lengths))
