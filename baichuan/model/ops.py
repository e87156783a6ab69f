"""The ops that the model is made of.  Each docstring is the specification that every executor implements.

Tensors are token-major, [num_tokens, features], in the model's dtype: sequences are packed one after
another without padding.  A sum is accumulated in float32 and rounded once, to the dtype of the result.

Operations that some executor fuses into one kernel are one op, whose name says what is fused.  decoder.py calls
`Ops`.  `ComposedOps` defines the fused ops by simple ones: an executor without fused kernels inherits from it and
implements only the simple ops.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Protocol

from baichuan.records import AttentionSpec, Step, Weight

Part = Any  # what one rank adds to a sum over the ranks, see Ops


class Ops(Protocol):
    """A Part is what this rank adds to a sum over the ranks, [num_tokens, hidden_size], in a form that is the
    executor's own: of one rank it is the whole, on GPUs it may be on its way to the other ranks.  partial_linear and
    gated_mlp make one.  Each goes into one op, in the order in which they were made: the next that takes a residual,
    which adds the ranks' parts up first.  Where residual is None, x is no part but the whole, rows of the embedding.
    """

    def embedding(self, tokens, weight):
        """weight[tokens].  tokens: [num_tokens] int64 in [0, vocab_size) -> [num_tokens, hidden_size]"""

    def norm_linear(self, x: Part, residual, norm, weight: Weight, eps: float):
        """(linear(n, weight), r) for (n, r) = add_rms_norm(all_reduce(x), residual, norm, eps).

        x, residual: [num_tokens, hidden_size]; residual None stands for 0 and a whole x.
        -> [num_tokens, out_features], [num_tokens, hidden_size]
        """

    def attention(self, qkv, cache: Any, spec: AttentionSpec, step: Step):
        """softmax(q kᵀ / sqrt(head_dim) + bias) v for each head and sequence, causal.

        qkv: [num_tokens, 3 * num_heads * head_dim], all q, all k, all v; it may be overwritten.  Stores k and v in the
        cache at the tokens' positions, quantised where the cache is, and attends to the stored values.  RoPE (half
        rotation, spec's base and factor) rotates q and k by their positions in float32 before that; ALiBi adds
        bias = slope[global head] * (key position - query position) in float32.
        -> [num_tokens, num_heads * head_dim]
        """

    def partial_linear(self, x, weight: Weight) -> Part:
        """x @ Wᵀ for the W that `weight` stands for (records.py gives each type's formula).

        x: [num_tokens, in_features], with W this rank's share of the input channels -> [num_tokens, out_features] in
        x's dtype.
        """

    def gated_mlp(self, x: Part, residual, norm, gate_up: Weight, down_proj: Weight, eps: float) -> tuple[Part, Any]:
        """(partial_linear(silu_mul(g), down_proj), r) for (g, r) = norm_linear(x, residual, norm, gate_up, eps).

        x, residual, both results: [num_tokens, hidden_size].
        """

    def norm_head(self, x: Part, residual, norm, weight: Weight, rows, vocab_size: int, eps: float):
        """head(select_rows(n, rows), weight, vocab_size) for (n, _) = add_rms_norm(all_reduce(x), residual, norm, eps).

        x, residual: [num_tokens, hidden_size]; rows: [num_outputs] int64 -> [num_outputs, vocab_size] float32
        """


class ComposedOps(ABC):
    """Ops whose fused ops are made of the simple ones below."""

    def norm_linear(self, x, residual, norm, weight: Weight, eps: float):
        normed, residual = self.sum_norm(x, residual, norm, eps)
        return self.linear(normed, weight), residual

    def partial_linear(self, x, weight: Weight):
        return self.linear(x, weight)

    def gated_mlp(self, x, residual, norm, gate_up: Weight, down_proj: Weight, eps: float):
        gate_and_up, residual = self.norm_linear(x, residual, norm, gate_up, eps)
        return self.linear(self.silu_mul(gate_and_up), down_proj), residual

    def norm_head(self, x, residual, norm, weight: Weight, rows, vocab_size: int, eps: float):
        normed, _ = self.sum_norm(x, residual, norm, eps)
        return self.head(self.select_rows(normed, rows), weight, vocab_size)

    def sum_norm(self, x, residual, norm, eps: float):
        """add_rms_norm of the sum of x over the ranks; where residual is None, of x."""
        return self.add_rms_norm(x if residual is None else self.all_reduce(x), residual, norm, eps)

    @abstractmethod
    def all_reduce(self, x):
        """The sum of x over the ranks, bit for bit the same on each."""

    @abstractmethod
    def add_rms_norm(self, x, residual, weight, eps: float):
        """r = x + residual, rounded to the dtype;  n = r / sqrt(mean(r²) + eps), rounded;  returns (n * weight, r).

        x, residual: [num_tokens, hidden_size]; residual None stands for 0.  The mean is taken in float32.
        """

    @abstractmethod
    def linear(self, x, weight: Weight):
        """x @ Wᵀ, as in Ops.partial_linear."""

    @abstractmethod
    def silu_mul(self, gate_up):
        """silu(gate) * up in float32.  gate_up: [num_tokens, 2 * intermediate], all gate, all up."""

    @abstractmethod
    def select_rows(self, x, rows):
        """x[rows].  rows: [num_outputs] int64 -> [num_outputs, features]"""

    @abstractmethod
    def head(self, x, weight: Weight, vocab_size: int):
        """Logits in float32: `linear` without rounding to the dtype, gathered over the ranks, padding cut off.

        x: [num_outputs, hidden_size] -> [num_outputs, vocab_size] float32
        """
