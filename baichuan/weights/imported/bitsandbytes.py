"""bitsandbytes' layouts: a type of 16 numbers by their index (NF4, FP4), and INT8 with a scale per row.

4 bits: weight [out * in / 2, 1] uint8, row by row, the first of two in the high bits; a block of consecutive numbers
shares weight.absmax; weight.quant_map [16] holds the numbers; weight.quant_state.bitsandbytes__* the sizes as JSON.
With double quantisation absmax is uint8: an index of weight.nested_quant_map [256], scaled by weight.nested_absmax,
plus an offset.  Source: Dettmers et al., QLoRA, section 3.
8 bits: weight [out, in] int8, SCB [out] float32: w = weight * SCB / 127.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from baichuan.errors import CheckpointError
from baichuan.quant.scaled import LIMITS, require_finite
from baichuan.util.strict_json import strict_json
from baichuan.weights.imported.parts import FLOATS, Parts, refuse_bias, setting, take
from baichuan.weights.source import TensorSource

STATES = ("weight.quant_state.bitsandbytes__nf4", "weight.quant_state.bitsandbytes__fp4")
MAX_STATE_BYTES = 4096
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True)
class BitsAndBytes:
    bits: int

    label = "bitsandbytes"
    ends = (
        *("weight", "SCB", "weight_format", "bias", "weight.absmax", "weight.quant_map"),
        *("weight.nested_absmax", "weight.nested_quant_map", *STATES),
    )

    @staticmethod
    def of(where: str, values: Mapping[str, Any]) -> BitsAndBytes:
        """The format by quantization_config.  Raises CheckpointError for a variant that would be read wrongly."""
        four, eight = (
            setting(where, values, names, (True, False), False)
            for names in (("load_in_4bit", "_load_in_4bit"), ("load_in_8bit", "_load_in_8bit"))
        )
        if four == eight:
            raise CheckpointError(f"{where} sets load_in_4bit and load_in_8bit alike; one of them is the checkpoint's")
        return BitsAndBytes(4 if four else 8)

    def matrix(self, module: str, parts: Parts, shape: tuple[int, int]) -> TensorSource:
        refuse_bias(module, parts)
        return _int8(module, parts, shape) if self.bits == 8 else _four_bits(module, parts, shape)


def _int8(module: str, parts: Parts, shape: tuple[int, int]) -> TensorSource:
    weight = take(module, parts, "weight", (torch.int8,), shape)
    scale = take(module, parts, "SCB", FLOATS, shape[:1])

    def read(start: int, stop: int) -> Tensor:
        scales = require_finite(scale.read(start, stop).float()) / LIMITS[torch.int8]
        return weight.read(start, stop).float() * scales[:, None]

    return TensorSource(shape, torch.float32, read)


def _four_bits(module: str, parts: Parts, shape: tuple[int, int]) -> TensorSource:
    rows, columns = shape
    state = _state(module, parts)
    size = setting(f"{module}'s quant_state", state, ("blocksize",), BLOCK_SIZES, None)
    if state.get("shape") != list(shape):
        raise CheckpointError(f"{module}'s quant_state says shape {state.get('shape')} and the model has {shape}")
    if columns % 2:
        raise CheckpointError(f"{module} has {columns} input channels, which 4 bits do not fill")
    packed = take(module, parts, "weight", (torch.uint8,), (rows * columns // 2, 1))
    numbers = require_finite(take(module, parts, "weight.quant_map", FLOATS, (16,)).read(0, 16).float())
    absmax = _Absmax(module, parts, state, -(-rows * columns // size))

    def read(start: int, stop: int) -> Tensor:
        first, last = start * columns, stop * columns  # these rows' numbers, of all numbers of the matrix
        octets = packed.read(first // 2, last // 2)[:, 0]
        indices = torch.stack((octets >> 4, octets & 0xF), dim=-1).flatten()
        # A scale for each number of the whole blocks that these rows touch.
        scales = absmax.read(first // size, -(-last // size)).repeat_interleave(size)
        before = first % size  # a row may begin within a block
        return (numbers[indices.long()] * scales[before : before + last - first]).view(stop - start, columns)

    return TensorSource(shape, torch.float32, read)


def _state(module: str, parts: Parts) -> dict[str, Any]:
    found = [parts[name] for name in STATES if name in parts]
    if (
        len(found) != 1
        or found[0].dtype != torch.uint8
        or len(found[0].shape) != 1
        or not 0 < found[0].shape[0] <= MAX_STATE_BYTES
    ):
        raise CheckpointError(f"the checkpoint has {module} in 4 bits without one readable quant_state; save it again")
    try:
        state = strict_json(bytes(found[0].read(0, found[0].shape[0]).tolist()))
    except (ValueError, RecursionError):
        state = None
    if not isinstance(state, dict):
        raise CheckpointError(f"{module}'s quant_state is no JSON object; save the checkpoint again")
    return state


class _Absmax:
    """The largest magnitude of each block, float32."""

    def __init__(self, module: str, parts: Parts, state: Mapping[str, Any], blocks: int):
        self.nested = "weight.nested_absmax" in parts
        if not self.nested:
            self.stored = take(module, parts, "weight.absmax", FLOATS, (blocks,))
            return
        self.stored = take(module, parts, "weight.absmax", (torch.uint8,), (blocks,))
        self.size = setting(f"{module}'s quant_state", state, ("nested_blocksize",), BLOCK_SIZES, None)
        count = -(-blocks // self.size)
        self.scales = take(module, parts, "weight.nested_absmax", FLOATS, (count,)).read(0, count).float()
        self.numbers = take(module, parts, "weight.nested_quant_map", FLOATS, (256,)).read(0, 256).float()
        offset = state.get("nested_offset")
        if not isinstance(offset, float):
            raise CheckpointError(f"{module}'s quant_state has no nested_offset; save the checkpoint again")
        self.offset = offset

    def read(self, start: int, stop: int) -> Tensor:
        stored = self.stored.read(start, stop)
        if not self.nested:
            return require_finite(stored.float())
        scales = self.scales[torch.arange(start, stop) // self.size]
        return require_finite(self.numbers[stored.long()] * scales + self.offset)
