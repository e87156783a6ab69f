"""An engine's weights on disk: a safetensors file, written block by block and read memory-mapped."""

from __future__ import annotations

import json
import os
import struct
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from baichuan.errors import EngineError
from baichuan.weights.rank_tensors import TensorBlocks
from baichuan.weights.safetensors_header import require_small_header

WRITERS = 3  # threads; one alone fills the page cache more slowly than a disk or a GPU delivers

_TYPE_NAMES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int8: "I8",
    torch.uint8: "U8",
}


def write_tensors(
    path: Path,
    tensors: Sequence[TensorBlocks],
    advance: Callable[[int], None],
    wrote: Callable[[int, int], None] = lambda start, size: None,
) -> None:
    """Write the tensors; holds a block for each writer, and the next, in memory.

    advance gets the bytes of each block; wrote gets the offset and size of each range once it is in the file.
    Format: https://github.com/huggingface/safetensors#format.  Wider types come first, so that every tensor is aligned.
    """
    specs = {name: spec for item in tensors for name, spec in item.specs.items()}
    header, offsets, end = {}, {}, 0
    for name in sorted(specs, key=lambda name: -specs[name][0].itemsize):
        dtype, shape = specs[name]
        offsets[name], end = end, end + dtype.itemsize * torch.Size(shape).numel()
        header[name] = {"dtype": _TYPE_NAMES[dtype], "shape": shape, "data_offsets": [offsets[name], end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 64 + 56)  # the data starts at a multiple of 64
    data = 8 + len(encoded)
    with open(path, "wb", buffering=0) as file, ThreadPoolExecutor(WRITERS) as pool:
        pending: deque[Future] = deque()

        def write(start: int, content) -> tuple[int, int]:
            done, view = 0, memoryview(content)
            while done < len(view):
                done += os.pwrite(file.fileno(), view[done:], start + done)
            return start, done

        def finish_one() -> None:
            start, size = pending.popleft().result()
            wrote(start, size)
            advance(size)

        wrote(*write(0, struct.pack("<Q", len(encoded)) + encoded))
        for item in tensors:
            for block in item.blocks():
                for name, rows in block.items():
                    content = rows.cpu().contiguous().view(-1).view(torch.uint8).numpy()
                    if len(pending) == WRITERS:
                        finish_one()
                    pending.append(pool.submit(write, data + offsets[name], content))
                    offsets[name] += content.nbytes
        while pending:
            finish_one()
        for name, entry in header.items():
            if offsets[name] != entry["data_offsets"][1]:
                raise AssertionError(f"{name} has another size than its shape {entry['shape']}")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The file's tensors, memory-mapped: no bytes are read before they are used."""
    try:
        require_small_header(path)
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise EngineError(f"{path} is not a readable engine file ({error}); build the engine again") from None
