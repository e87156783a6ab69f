"""AWQ's gemm layout, as AutoAWQ writes it: 4 bits, output channels interleaved within each word.

qweight [in, out / 8] int32; qzeros [groups, out / 8] int32; scales [groups, out].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from baichuan.errors import CheckpointError
from baichuan.weights.imported.grouped import Grouped, group_count
from baichuan.weights.imported.packing import columns_unpacked
from baichuan.weights.imported.parts import FLOATS, INT32, Parts, group_size, refuse_bias, setting, take
from baichuan.weights.source import TensorSource

BITS, PER_WORD = 4, 8
PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # where a word holds each of its output channels, counted from the lowest bits


@dataclass(frozen=True)
class Awq:
    group_size: int  # 0 = the whole row

    label = "AWQ"
    bits = BITS
    ends = ("qweight", "qzeros", "scales", "bias")

    @staticmethod
    def of(where: str, values: Mapping[str, Any]) -> Awq:
        """The format by quantization_config.  Raises CheckpointError for a variant that would be read wrongly."""
        setting(where, values, ("bits", "w_bit"), (BITS,), BITS)
        setting(where, values, ("version",), ("gemm", "GEMM"), "gemm")
        return Awq(group_size(where, values, ("group_size", "q_group_size")))

    def matrix(self, module: str, parts: Parts, shape: tuple[int, int]) -> TensorSource:
        refuse_bias(module, parts)
        rows, columns = shape
        count = group_count(columns, self.group_size)
        if columns % (self.group_size or columns) or rows % PER_WORD:
            raise CheckpointError(f"{module} is {shape} and AWQ has whole words of {PER_WORD} and whole groups")
        qweight = take(module, parts, "qweight", INT32, (columns, rows // PER_WORD))
        qzeros = take(module, parts, "qzeros", INT32, (count, rows // PER_WORD))
        scales = take(module, parts, "scales", FLOATS, (count, rows))
        return Grouped(
            module,
            shape,
            BITS,
            self.group_size,
            integers=lambda start, stop: columns_unpacked(qweight.columns, BITS, start, stop, PLACES).t(),
            scales=lambda start, stop: scales.columns(start, stop).t().contiguous(),
            scale_dtype=scales.dtype,
            zeros=lambda start, stop: columns_unpacked(qzeros.columns, BITS, start, stop, PLACES).t(),
        ).source()
