"""KV caches whose rows lie scattered over the blocks, as after many requests."""

import torch

from baichuan.records import LayerCache


def scattered(rows, capacity, spec, dtype, device="cpu", scales=(None, None), fill=0, tokens_per_block=16):
    """A cache of `fill` with a block more than the rows need: the first, which belongs to nobody."""
    cache = LayerCache.whole_rows(rows + 1, capacity, spec, dtype, device, scales, tokens_per_block)
    order = torch.randperm(rows * cache.tables.shape[1], generator=torch.Generator().manual_seed(rows)) + 1
    cache.tables[:rows] = order.view(rows, -1).int().to(device)
    for kept in (cache.k, cache.v):
        kept.copy_(torch.full(kept.shape, fill, device=device, dtype=torch.float32).to(dtype))
    return cache


def row_of(cache, row):
    """(k, v) of a whole row, each [num_heads, capacity, head_dim]."""
    return cache.row(row, cache.tables.shape[1] * cache.tokens_per_block)
