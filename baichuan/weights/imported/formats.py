"""Checkpoints that other tools quantised: recognised by config.json, their matrices dequantised as they are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from baichuan.errors import CheckpointError
from baichuan.weights.imported.awq import Awq
from baichuan.weights.imported.bitsandbytes import BitsAndBytes
from baichuan.weights.imported.compressed_tensors import CompressedTensors
from baichuan.weights.imported.gptq import Gptq
from baichuan.weights.imported.parts import Parts
from baichuan.weights.source import TensorSource

FORMATS: dict[str, Any] = {
    "gptq": Gptq,
    "awq": Awq,
    "compressed-tensors": CompressedTensors,
    "bitsandbytes": BitsAndBytes,
}


class Format(Protocol):
    """How one tool stores a quantised matrix."""

    @property
    def label(self) -> str:
        """Its name, for messages."""

    @property
    def bits(self) -> int:
        """Bits of an integer."""

    @property
    def ends(self) -> tuple[str, ...]:
        """How the names of its tensors go on after the module's."""

    def matrix(self, module: str, parts: Parts, shape: tuple[int, int]) -> TensorSource:
        """The matrix.  Raises CheckpointError for parts that are missing or wrong."""


def format_of(where: str, values: Mapping[str, Any]) -> Format | None:
    """How config.json's values say that the checkpoint is quantised; None where they do not.  where: names the file.

    Raises CheckpointError for a tool, or a variant of its format, that is not read.
    """
    settings = values.get("quantization_config")
    if settings is None:
        return None
    settings = settings if isinstance(settings, dict) else {}
    name = settings.get("quant_method")
    if not name and any(key.startswith(("bnb_", "load_in_")) for key in settings):
        name = "bitsandbytes"
    if not isinstance(name, str) or name not in FORMATS:
        raise CheckpointError(
            f"{where} describes a checkpoint quantised by {str(name or 'an unnamed method')[:40]}, and only those by "
            f"{', '.join(FORMATS)} are read; take the float checkpoint that it was made from"
        )
    return FORMATS[name].of(f"the quantization_config of {where}", settings)


def dequantised(
    tensors: Mapping[str, TensorSource], form: Format, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, TensorSource]:
    """The tensors with each quantised matrix in place of its parts.  shapes: of the model, by the hub's names."""
    places = {f"{name.removesuffix('.weight')}.{end}": (name, end) for name in shapes for end in form.ends}
    parts: dict[str, dict[str, TensorSource]] = {}  # each matrix's parts, by the ends of their names
    others = {}
    for tensor, source in tensors.items():
        if tensor in places:
            name, end = places[tensor]
            parts.setdefault(name, {})[end] = source
        else:
            others[tensor] = source
    for name, found in parts.items():
        module, shape = name.removesuffix(".weight"), shapes[name]
        if "weight" in found and found["weight"].dtype.is_floating_point:
            others |= {f"{module}.{end}": source for end, source in found.items()}  # left as it was
        elif len(shape) != 2:
            raise CheckpointError(f"{module} is quantised and is no matrix; take the float checkpoint")
        else:
            others[name] = form.matrix(module, found, (shape[0], shape[1]))
    return others
