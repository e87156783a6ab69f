"""The KV cache of PyTorch's executors, on CPUs and GPUs: a contiguous row for each sequence, in every layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from baichuan.config import QuantConfig
from baichuan.executors.memory import KV_DTYPES, require_memory
from baichuan.records import AttentionSpec, LayerCache, LayerWeights, ModelWeights


@dataclass(frozen=True)
class KVCache:
    """executors.base.Cache: what each layer keeps of the sequences that are being generated."""

    layers: tuple[LayerCache, ...] = ()  # all of one shape; none before there is room for any sequence

    @classmethod
    def allocate(
        cls, weights: ModelWeights, quant: QuantConfig, spec: AttentionSpec, batch_size: int, capacity: int
    ) -> KVCache:
        """Room for batch_size sequences of up to capacity tokens, on the weights' device, with the layers' scales.

        Raises UnsupportedError with the numbers when the memory does not suffice.
        """
        device, dtype = weights.embedding.device, KV_DTYPES[quant.kv_cache] or weights.embedding.dtype
        shape = torch.Size((2, batch_size, spec.num_heads, capacity, spec.head_dim))  # k, v
        size = len(weights.layers) * shape.numel() * dtype.itemsize
        require_memory(size, f"a KV cache of {batch_size} x {capacity} tokens", device)

        def zeros(layer: LayerWeights) -> LayerCache:
            k, v = torch.zeros(shape, dtype=dtype, device=device)
            return LayerCache(k, v, layer.k_scale, layer.v_scale)

        return cls(tuple(map(zeros, weights.layers)))

    @property
    def batch_size(self) -> int:
        return self.layers[0].k.shape[0] if self.layers else 0

    @property
    def capacity(self) -> int:
        return self.layers[0].k.shape[2] if self.layers else 0

    @torch.inference_mode()
    def reorder(self, parents: Tensor) -> None:
        rows = parents.shape[0]
        for layer in self.layers:
            layer.k[:rows] = layer.k[parents]
            layer.v[:rows] = layer.v[parents]

    def truncate(self, row: int, length: int) -> None:
        """Nothing moves: attention sees the positions below a step's context_lengths alone."""
