"""Timing on a GPU: captured graphs, events, operands beyond the caches, and ceilings measured on the same GPU."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch

from baichuan.errors import UnsupportedError

CACHE_BYTES = 256 << 20  # several times the second-level cache of any GPU so far


def require_gpu(program: str, instead: str) -> None:
    """Raise UnsupportedError, which says what to do instead, on a machine without a GPU."""
    if not torch.cuda.is_available():
        raise UnsupportedError(f"{program} needs a GPU and this machine has none; {instead}")


def copies_beyond_cache(bytes_each: int) -> int:
    """The number of copies of an operand that together exceed the caches."""
    return max(2, -(-CACHE_BYTES // max(bytes_each, 1)))


def seconds(calls: Sequence[Callable[[], object]], replays: int = 5, calls_per_graph: int = 0) -> float:
    """Seconds per call: the median over replays of a graph that runs `calls` in turn, at least 20 calls in all."""
    count = calls_per_graph or max(20, len(calls))
    for call in calls:
        call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(count):
            calls[index % len(calls)]()
    graph.replay()
    times = []
    for _ in range(replays):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / count)
    return statistics.median(times)


def copy_bandwidth() -> float:
    """Bytes per second of a device-to-device copy, read and written bytes counted."""
    source = torch.empty(1 << 30, dtype=torch.float16, device="cuda").normal_()
    target = torch.empty_like(source)
    kernel = seconds([lambda: torch.neg(source, out=target)], calls_per_graph=3)  # copy_ uses the slower copy engine
    return 2 * source.nbytes / kernel


def gemm_rate(dtype: torch.dtype, size: int = 8192) -> float:
    """Operations per second of a size³ matrix product by cuBLAS, on random numbers."""
    a, b = (torch.randn(size, size, device="cuda").to(dtype) for _ in range(2))
    if dtype == torch.float8_e4m3fn:
        one = torch.ones((), device="cuda")
        time = seconds([lambda: torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.float16)], calls_per_graph=5)
    elif dtype == torch.int8:
        a, b = (torch.randint(-127, 128, (size, size), device="cuda", dtype=torch.int8) for _ in range(2))
        time = seconds([lambda: torch._int_mm(a, b.t())], calls_per_graph=5)
    else:
        time = seconds([lambda: torch.mm(a, b.t())], calls_per_graph=5)
    return 2 * size**3 / time
