"""Run under mpirun by test_multi_gpu.py: sums over the ranks' GPUs, eagerly and in a replayed graph."""

import sys

import torch

from baichuan.executors.cuda.comm import ONE_SHOT_BYTES, Nccl
from baichuan.executors.device import gpu_of_rank
from baichuan.parallel.comm import world_of_this_process


def main() -> int:
    host = world_of_this_process()
    device = gpu_of_rank(host)
    comm = Nccl(host, device)
    print(f"peer memory {'mapped' if comm._peers else 'not mapped'}", flush=True)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for elements in (1, 5120, 40961, ONE_SHOT_BYTES):  # the last is over the limit, so that NCCL sums it
            for turn in range(6):
                parts = [drawn(rank, turn, elements, dtype) for rank in range(comm.world_size)]
                expected = torch.stack(parts).sum(0, dtype=torch.float32)
                result = comm.all_reduce(parts[comm.rank].to(device)).cpu()
                exact = elements * dtype.itemsize <= ONE_SHOT_BYTES or comm.world_size == 2
                tolerance = 0 if exact else 4 * torch.finfo(dtype).eps
                assert torch.allclose(result.float(), expected.to(dtype).float(), rtol=tolerance, atol=tolerance)
    check_graph(comm, device)
    gathered = comm.all_gather(torch.full((2, 3), float(comm.rank), device=device)).cpu()
    assert torch.equal(gathered, torch.arange(comm.world_size).repeat_interleave(3).float().expand(2, -1))
    largest = comm.all_reduce_max(torch.tensor([comm.rank, -comm.rank], device=device)).tolist()
    assert largest == [comm.world_size - 1, 0]
    return 0


def drawn(rank: int, turn: int, elements: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(elements, generator=torch.Generator().manual_seed(100 * rank + turn)).to(dtype)


def check_graph(comm: Nccl, device: torch.device) -> None:
    """A chain of sums, replayed with new inputs; each rank must see every other's newest numbers."""
    x = torch.zeros(5120, dtype=torch.float32, device=device)

    def chain() -> torch.Tensor:
        y = x
        for _ in range(80):
            y = comm.all_reduce(y / comm.world_size)
        return y

    chain()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = chain()
    for turn in range(20):
        parts = [drawn(rank, turn, 5120, torch.float32) for rank in range(comm.world_size)]
        x.copy_(parts[comm.rank])
        graph.replay()
        assert torch.allclose(y.cpu(), torch.stack(parts).mean(0), rtol=1e-4, atol=1e-5)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(20):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    print(f"{start.elapsed_time(end) / 20 / 80 * 1000:.2f} us a sum of 20 KB with its division, in a graph", flush=True)


if __name__ == "__main__":
    sys.exit(main())
