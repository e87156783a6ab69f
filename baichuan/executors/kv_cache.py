"""The KV cache of PyTorch's executors, on CPUs and GPUs: a pool of blocks in every layer and a table of who has which.

tables      row 0   2 0 3          row 0 keeps tokens 0 to 63 in block 2, 64 to 127 in block 0 ...
            row 1   2 1 -          row 1 begins with the same 64 tokens and shares their block
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from baichuan.config import QuantConfig
from baichuan.errors import UnsupportedError
from baichuan.executors.memory import KV_DTYPES, free_memory
from baichuan.parallel.comm import Communicator
from baichuan.records import AttentionSpec, LayerCache, LayerWeights, ModelWeights

ALIGNMENT = 64  # bytes; of a cache on the CPU


@dataclass(frozen=True)
class PoolSettings:
    """How the memory of a KV cache is cut up, and how much of it there may be."""

    tokens_per_block: int = 64  # a power of two
    free_fraction: float = 0.9  # most that the cache takes, as a share of the memory free before
    most_blocks: int | None = None


@dataclass(frozen=True)
class KVCache:
    """executors.base.PagedCache"""

    layers: tuple[LayerCache, ...] = ()  # all of one shape, with the same tables; none before there is room for a row

    @classmethod
    def allocate(
        cls,
        weights: ModelWeights,
        quant: QuantConfig,
        spec: AttentionSpec,
        rows: int,
        capacity: int,
        comm: Communicator,
        settings: PoolSettings | None = None,
        kept_free: int = 0,
    ) -> KVCache:
        """Tables for `rows` sequences of up to `capacity` tokens, and blocks for all of them, but no more than the
        settings allow on any rank; on the weights' device, with the layers' scales.

        kept_free: bytes that are left to others as well, where that is not more than half of what is free.
        Raises UnsupportedError with the numbers, on every rank, when the memory does not suffice for one sequence.
        """
        settings, device = settings or PoolSettings(), weights.embedding.device
        dtype = KV_DTYPES[quant.kv_cache] or weights.embedding.dtype
        size = settings.tokens_per_block
        per_row = -(-capacity // size)
        block_bytes = 2 * len(weights.layers) * spec.num_heads * size * spec.head_dim * dtype.itemsize
        free = free_memory(device)
        free -= kept_free if 2 * kept_free <= free else 0
        blocks = min(rows * per_row, int(settings.free_fraction * free) // block_bytes)
        blocks = min(comm.gather_objects(min(blocks, settings.most_blocks or blocks)))
        if blocks < per_row:
            raise UnsupportedError(
                f"a KV cache for one sequence of {capacity} tokens needs {per_row * block_bytes / 1e9:.2f} GB of "
                f"{'GPU' if device.type == 'cuda' else 'host'} memory and {blocks * block_bytes / 1e9:.2f} GB may be "
                "used; use shorter lengths, more ranks or an 8-bit KV cache"
            )
        tables = torch.zeros(rows, per_row, dtype=torch.int32, device=device)
        shape = (blocks, spec.num_heads, size, spec.head_dim)

        def layer_cache(layer: LayerWeights) -> LayerCache:
            k, v = (_zeros(shape, dtype, device) for _ in range(2))
            return LayerCache(k, v, tables, layer.k_scale, layer.v_scale)

        cache = cls(tuple(map(layer_cache, weights.layers)))
        cache.forget()
        return cache

    @property
    def blocks(self) -> int:
        return self.layers[0].k.shape[0]

    @property
    def tokens_per_block(self) -> int:
        return self.layers[0].tokens_per_block

    @property
    def rows(self) -> int:
        return self.layers[0].tables.shape[0] if self.layers else 0

    @property
    def capacity(self) -> int:
        """Tokens of a row."""
        return self.layers[0].tables.shape[1] * self.tokens_per_block if self.layers else 0

    def forget(self) -> None:
        """Give each row blocks of its own, as far as there are enough: whoever shares blocks calls set_tables."""
        tables = self.layers[0].tables
        tables.copy_((torch.arange(tables.numel()) % self.blocks).view_as(tables))

    def set_tables(self, rows: Sequence[Sequence[int]]) -> None:
        """Row r has the blocks rows[r] from the next step on."""
        tables = self.layers[0].tables
        host = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int32, pin_memory=tables.is_cuda)
        array = host.numpy()
        for place, blocks in enumerate(rows):
            array[place, : len(blocks)] = blocks
        tables[: host.shape[0], : host.shape[1]].copy_(host, non_blocking=True)

    @torch.inference_mode()
    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy each (source, target); no target is a source."""
        both = torch.tensor(copies, dtype=torch.int64)
        device = self.layers[0].tables.device
        if device.type == "cuda":
            both = both.pin_memory()
        source, target = both.to(device, non_blocking=True).unbind(1)
        for layer in self.layers:
            for kept in (layer.k, layer.v):
                numbers = kept.view(torch.uint8) if kept.dtype.itemsize == 1 else kept  # FP8 lacks this operator
                numbers[target] = numbers[source]


def _zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on the CPU memory is taken where it is first written, so that what no request uses costs nothing."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = torch.Size(shape).numel() * dtype.itemsize
    memory = np.zeros(size + ALIGNMENT, dtype=np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return torch.from_numpy(memory[start : start + size]).view(dtype).view(shape)
