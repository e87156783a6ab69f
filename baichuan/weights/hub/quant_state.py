"""bitsandbytes' state of a matrix as a list, as Baichuan2-*-Chat-4bits pickles it: its tensors by today's names.

The list, of bitsandbytes 0.41: [absmax, shape, dtype, blocksize, [offset, [nested absmax, nested numbers, nested
blocksize, ...]] or None, type, numbers].
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from baichuan.weights.hub.tensor_pickle import StoredTensor
from baichuan.weights.source import TensorSource, known

STATE_END, DATA_END = ".weight.quant_state", ".weight.data"
TYPES = ("nf4", "fp4")


def todays_name(name: str) -> str:
    """X.weight for X.weight.data, as such checkpoints call a matrix's 4-bit numbers; other names unchanged."""
    return name.removesuffix(".data") if name.endswith(DATA_END) else name


def state_sources(name: str, state: Any, source: Callable[[StoredTensor], TensorSource]) -> dict[str, TensorSource]:
    """The tensors of the list called `name`, X.weight.quant_state.  Raises ValueError, IndexError or TypeError."""
    absmax, shape, _, blocksize, nested, kind, numbers = state
    if type(kind) is not str or kind not in TYPES:
        raise ValueError("a quant_state is of an unknown type")
    found = {"absmax": absmax, "quant_map": numbers}
    values: dict[str, Any] = {"shape": [*map(_integer, shape)], "blocksize": _integer(blocksize)}
    if nested is not None:
        offset, (nested_absmax, nested_numbers, nested_blocksize, *_) = nested
        found |= {"nested_absmax": nested_absmax, "nested_quant_map": nested_numbers}
        if _stored(offset).shape not in ((), (1,)):
            raise ValueError("a quant_state's offset is no number")
        offset_value = source(replace(offset, shape=(1,), stride=(1,))).read(0, 1).item()
        values |= {"nested_blocksize": _integer(nested_blocksize), "nested_offset": offset_value}
    prefix = name.removesuffix(".quant_state")
    sources = {f"{prefix}.{part}": source(_stored(tensor)) for part, tensor in found.items()}
    text = json.dumps(values, allow_nan=False).encode()
    return sources | {f"{name}.bitsandbytes__{kind}": known(torch.tensor(list(text), dtype=torch.uint8))}


def _integer(value: Any) -> int:
    if type(value) is not int:  # a nested tuple can be endless to print
        raise ValueError("a quant_state holds no number in place of a size")
    return value


def _stored(value: Any) -> StoredTensor:
    if not isinstance(value, StoredTensor):
        raise ValueError(f"a quant_state holds a {type(value).__name__} in place of a tensor")
    return value
