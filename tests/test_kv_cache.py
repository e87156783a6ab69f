"""The pool of the paged KV cache: its size, what ranks agree on, and blocks that are copied."""

from __future__ import annotations

import golden_sessions
import pytest
import torch

from baichuan.config import QuantConfig
from baichuan.errors import UnsupportedError
from baichuan.executors import kv_cache
from baichuan.executors.kv_cache import KVCache, PoolSettings
from baichuan.model.decoder import attention_spec
from baichuan.parallel.comm import Solo, run_ranks

MODEL = golden_sessions.model("v1_7b")
BLOCK_BYTES = 2 * MODEL.num_layers * MODEL.hidden_size * 16 * 4  # keys and values of 16 tokens in float32


def allocate(rows=3, capacity=100, comm=None, kept_free=0, quant=None, **settings):
    comm = comm or Solo()
    weights = golden_sessions.weights("v1_7b", "float32", comm.rank, comm.world_size)
    spec = attention_spec(MODEL, comm.rank, comm.world_size)
    pool = PoolSettings(tokens_per_block=16, **settings)
    return KVCache.allocate(weights, quant or QuantConfig(), spec, rows, capacity, comm, pool, kept_free)


@pytest.fixture
def free(monkeypatch):
    """Sets the memory that is free, in blocks of this file's model."""
    return lambda blocks: monkeypatch.setattr(kv_cache, "free_memory", lambda device: blocks * BLOCK_BYTES)


def test_the_pool_holds_the_limits_and_no_more_than_its_share_of_what_is_free(free):
    free(1000)
    assert (allocate().blocks, allocate().capacity) == (3 * 7, 7 * 16)
    free(20)
    assert allocate().blocks == 18
    assert allocate(free_fraction=0.5).blocks == 10
    assert allocate(most_blocks=8).blocks == 8
    assert allocate(kept_free=5 * BLOCK_BYTES).blocks == 13
    assert allocate(kept_free=11 * BLOCK_BYTES).blocks == 18, "others get no more than half"
    free(7)
    with pytest.raises(UnsupportedError, match=r"one sequence of 100 tokens needs .* GB of host memory and .* GB may"):
        allocate()


def test_ranks_have_pools_of_one_size():
    """The rank with the least free memory decides; an error is every rank's."""

    def blocks(comm):
        return allocate(comm=comm, most_blocks=(9, 8)[comm.rank]).blocks

    def refused(comm):
        with pytest.raises(UnsupportedError):
            allocate(comm=comm, most_blocks=(9, 6)[comm.rank])

    assert run_ranks(2, blocks) == [8, 8]
    run_ranks(2, refused)


@pytest.mark.parametrize("kv_cache", ["none", "int8", "fp8"])
def test_blocks_are_copied_in_every_layer(kv_cache):
    cache = allocate(quant=QuantConfig(kv_cache=kv_cache))
    for kept in (kept for layer in cache.layers for kept in (layer.k, layer.v)):
        kept.copy_(torch.arange(kept.shape[0])[:, None, None, None].expand(kept.shape).to(kept.dtype))
    cache.copy_blocks([(3, 5), (4, 0)])
    for kept in (kept for layer in cache.layers for kept in (layer.k, layer.v)):
        assert kept[:7, 0, 0, 0].float().tolist() == [4, 1, 2, 3, 4, 3, 6]
