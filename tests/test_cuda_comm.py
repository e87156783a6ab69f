"""What the sums through peers' memory need of their callers, without a GPU: the buffers alternate, a step's calls are
even in number.  The sums themselves: test_cuda_kernels.py, and test_multi_gpu.py on GPUs."""

from types import SimpleNamespace

import pytest
import torch

from baichuan.executors.cuda import comm
from baichuan.executors.cuda.comm import BUFFERS, ONE_SHOT_BYTES, _PeerMemory


@pytest.fixture
def peers(monkeypatch):
    """(a rank's peer memory, the addresses of the buffers that its sums have used)"""
    memory = torch.zeros(BUFFERS * ONE_SHOT_BYTES + 1024, dtype=torch.uint8)
    used = []

    def sum_of(x, buffers, flags, own_buffer, rank, world_size):
        assert own_buffer.data_ptr() == buffers[rank] and own_buffer.shape == x.shape
        used.append(own_buffer.data_ptr())
        return x

    monkeypatch.setattr(comm, "one_shot_all_reduce", sum_of)
    return _PeerMemory(memory, SimpleNamespace(buffer_ptrs=[memory.data_ptr()] * 2), 0, 2), used


def test_consecutive_sums_use_different_buffers_from_step_to_step(peers):
    memory, used = peers
    for _ in range(2):  # steps
        for _ in range(4):  # two layers
            memory.all_reduce(torch.ones(8))
        memory.end_step()
    assert len(set(used)) == 2 and all(one != other for one, other in zip(used, used[1:], strict=False))


def test_an_odd_number_of_sums_is_noticed(peers):
    memory, _ = peers
    for _ in range(3):
        memory.all_reduce(torch.ones(8))
    with pytest.raises(AssertionError, match="odd number of sums"):
        memory.end_step()
