"""A function of many small kernels as one launch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def replayed(
    function: Callable[..., tuple[Tensor, ...]], example: Sequence[Tensor]
) -> Callable[..., tuple[Tensor, ...]]:
    """The function as a CUDA graph, for tensors shaped like those of the example, which it may overwrite.

    What a call returns is valid until the next call.
    """
    inputs = [each.clone() for each in example]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # libraries allocate what they need before the capture
        function(*inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = function(*inputs)

    def replay(*tensors: Tensor) -> tuple[Tensor, ...]:
        for target, tensor in zip(inputs, tensors, strict=True):
            target.copy_(tensor)
        graph.replay()
        return outputs

    return replay
