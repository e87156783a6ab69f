"""One quantised matrix as a file holds it: several tensors, checked before they are used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from baichuan.errors import CheckpointError
from baichuan.weights.source import TensorSource

INT32 = (torch.int32,)
FLOATS = (torch.float16, torch.bfloat16, torch.float32)

Parts = Mapping[str, TensorSource]  # a matrix's tensors by the ends of their names, such as qweight


def take(module: str, parts: Parts, end: str, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...]) -> TensorSource:
    """The part with this end.  Raises CheckpointError where it is missing, or of another type or shape."""
    if end not in parts:
        raise CheckpointError(f"the checkpoint has {module} quantised and lacks its {end}; download it again")
    source = parts[end]
    if source.dtype not in dtypes or source.shape != shape:
        raise CheckpointError(
            f"{module}.{end} is {str(source.dtype).removeprefix('torch.')} of shape {source.shape} and "
            f"{' or '.join(str(each).removeprefix('torch.') for each in dtypes)} of shape {shape} is expected; its "
            "quantization_config does not fit it, take both from the same place again"
        )
    return source


def refuse_bias(module: str, parts: Parts) -> None:
    """Some tools write a bias of zeros for a matrix that has none; Baichuan has none."""
    bias = parts.get("bias")
    if bias and (len(bias.shape) != 1 or bias.read(0, bias.shape[0]).count_nonzero()):
        raise CheckpointError(f"the checkpoint has a bias for {module}, which no Baichuan has; take another one")


def setting(where: str, values: Mapping[str, Any], names: tuple[str, ...], known: tuple[Any, ...], default: Any) -> Any:
    """The value of the first of the names that is set; it must be one of `known`.  where: names the settings."""
    name, value = next(((name, values[name]) for name in names if values.get(name) is not None), (names[0], default))
    if not any(type(value) is type(each) and value == each for each in known):
        raise CheckpointError(
            f"{where} sets {name} to {str(value)[:40]!r} and only {', '.join(map(str, known))} can be read; take the "
            "float checkpoint that it was made from"
        )
    return value


GROUP_SIZES = (-1, 32, 64, 128)


def group_size(
    where: str, values: Mapping[str, Any], names: tuple[str, ...] = ("group_size",), default: int | None = 128
) -> int:
    """Input channels that share a scale; 0 = the whole row, which the files call -1."""
    return max(setting(where, values, names, GROUP_SIZES, default), 0)
