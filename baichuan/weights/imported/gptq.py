"""GPTQ's layout, as AutoGPTQ and GPTQModel write it.

qweight [in * bits / 32, out] int32, packed along the input channels; qzeros [groups, out * bits / 32] int32, packed
along the output channels; scales [groups, out]; g_idx [in] int32.  The first version of the format holds words of zeros
from which a word of ones was subtracted, with what is borrowed from one number to the next.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from baichuan.errors import CheckpointError
from baichuan.weights.imported.grouped import Grouped, channel_groups, group_count
from baichuan.weights.imported.packing import columns_unpacked, unpacked
from baichuan.weights.imported.parts import FLOATS, INT32, Parts, group_size, refuse_bias, setting, take
from baichuan.weights.source import TensorSource

ONES = {4: 0x11111111, 8: 0x01010101}  # a word of them, by the number of bits


@dataclass(frozen=True)
class Gptq:
    bits: int
    group_size: int  # 0 = the whole row
    symmetric: bool  # every zero is in the middle
    ordered: bool  # input channels are ordered by activations (desc_act): a group may have any of them
    added: int  # what is added to every word of zeros

    label = "GPTQ"
    ends = ("qweight", "qzeros", "scales", "g_idx", "bias")

    @staticmethod
    def of(where: str, values: Mapping[str, Any]) -> Gptq:
        """The format by quantization_config.  Raises CheckpointError for a variant that would be read wrongly."""
        version = setting(where, values, ("checkpoint_format", "format"), ("gptq", "gptq_v2"), "gptq")
        setting(where, values, ("pack_dtype",), ("int32",), "int32")
        setting(where, values, ("is_marlin_format",), (False,), False)
        if isinstance(dynamic := values.get("dynamic"), dict) and not all(key.startswith("-:") for key in dynamic):
            raise CheckpointError(f"{where} sets dynamic, other settings for some matrices, which cannot be read")
        bits = setting(where, values, ("bits",), (4, 8), None)
        return Gptq(
            bits,
            group_size(where, values),
            symmetric=setting(where, values, ("sym",), (True, False), False),
            ordered=setting(where, values, ("desc_act",), (True, False), False),
            added=ONES[bits] if version == "gptq" else 0,
        )

    def matrix(self, module: str, parts: Parts, shape: tuple[int, int]) -> TensorSource:
        refuse_bias(module, parts)
        rows, columns = shape
        count, per_word = group_count(columns, self.group_size), 32 // self.bits
        if columns % per_word or rows % per_word:
            raise CheckpointError(f"{module} is {shape} and {self.bits}-bit integers fill words of {per_word} of them")
        qweight = take(module, parts, "qweight", INT32, (columns // per_word, rows))
        qzeros = take(module, parts, "qzeros", INT32, (count, rows // per_word))
        scales = take(module, parts, "scales", FLOATS, (count, rows))
        groups = None
        if "g_idx" in parts or self.ordered or columns % (self.group_size or columns):
            g_idx = take(module, parts, "g_idx", INT32, (columns,))
            groups = channel_groups(module, g_idx.read(0, columns), columns, self.group_size)

        def zero_words(first: int, last: int) -> Tensor:
            return qzeros.columns(first, last) + self.added

        return Grouped(
            module,
            shape,
            self.bits,
            self.group_size,
            integers=lambda start, stop: unpacked(qweight.columns(start, stop).t(), self.bits),
            scales=lambda start, stop: scales.columns(start, stop).t().contiguous(),
            scale_dtype=scales.dtype,
            zeros=lambda start, stop: columns_unpacked(zero_words, self.bits, start, stop).t(),
            symmetric=self.symmetric,
            groups=groups,
        ).source()
