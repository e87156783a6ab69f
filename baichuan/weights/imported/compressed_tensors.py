"""compressed-tensors' pack-quantized layout of weights alone (W4A16, W8A16), as LLM Compressor writes it.

weight_packed [out, in * bits / 32] int32, packed along the input channels; weight_scale [out, groups];
weight_zero_point [out * bits / 32, groups] int32, packed along the output channels; weight_shape [2];
weight_g_idx [in] int32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from baichuan.errors import CheckpointError
from baichuan.weights.imported.grouped import Grouped, channel_groups, group_count
from baichuan.weights.imported.packing import columns_unpacked, unpacked
from baichuan.weights.imported.parts import FLOATS, INT32, Parts, group_size, refuse_bias, setting, take
from baichuan.weights.source import TensorSource

LAYOUT = "pack-quantized"
EMPTY = ("kv_cache_scheme", "transform_config")  # settings that would change what is computed


@dataclass(frozen=True)
class CompressedTensors:
    bits: int
    group_size: int  # 0 = the whole row
    symmetric: bool
    ordered: bool  # groups may be of any input channels

    label = "compressed-tensors"
    ends = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx", "bias")

    @staticmethod
    def of(where: str, values: Mapping[str, Any]) -> CompressedTensors:
        """The format by quantization_config.  Raises CheckpointError for a variant that would be read wrongly."""
        if used := [name for name in EMPTY if values.get(name)]:
            raise CheckpointError(f"{where} sets {used[0]}, which cannot be read; take the float checkpoint")
        if isinstance(sparsity := values.get("sparsity_config"), dict):
            setting(where, sparsity, ("format",), ("dense",), "dense")
        groups = values.get("config_groups")
        if not isinstance(groups, dict) or not groups or not all(isinstance(each, dict) for each in groups.values()):
            raise CheckpointError(f"{where} has no config_groups that can be read; take the float checkpoint")
        whole = {"format": values.get("format")}
        schemes = {CompressedTensors._of_group(where, whole | each) for each in groups.values()}
        if len(schemes) > 1:
            raise CheckpointError(f"{where} has several kinds of config_groups; only one for all matrices can be read")
        return schemes.pop()

    @staticmethod
    def _of_group(where: str, group: Mapping[str, Any]) -> CompressedTensors:
        setting(where, group, ("format",), (LAYOUT,), LAYOUT)
        for activations in ("input_activations", "output_activations"):
            if group.get(activations):
                raise CheckpointError(f"{where} quantises {activations}, and only weights alone can be read")
        weights = group.get("weights")
        if not isinstance(weights, dict):
            raise CheckpointError(f"{where} has config_groups without weights; take the float checkpoint")
        setting(where, weights, ("type",), ("int",), "int")
        setting(where, weights, ("dynamic",), (False,), False)
        per_channel = setting(where, weights, ("strategy",), ("group", "channel"), None) == "channel"
        order = setting(where, weights, ("actorder",), ("none", "group", "weight", "static", False), "none")
        return CompressedTensors(
            bits=setting(where, weights, ("num_bits",), (4, 8), None),
            group_size=0 if per_channel else group_size(where, weights, default=None),
            symmetric=setting(where, weights, ("symmetric",), (True, False), True),
            ordered=order == "group",
        )

    def matrix(self, module: str, parts: Parts, shape: tuple[int, int]) -> TensorSource:
        refuse_bias(module, parts)
        rows, columns = shape
        count, per_word = group_count(columns, self.group_size), 32 // self.bits
        if columns % (self.group_size or columns):
            raise CheckpointError(f"{module} has {columns} input channels, no whole groups of {self.group_size}")
        packed = take(module, parts, "weight_packed", INT32, (rows, -(-columns // per_word)))
        scale = take(module, parts, "weight_scale", FLOATS, (rows, count))
        stated = take(module, parts, "weight_shape", (torch.int64, torch.int32), (2,)).read(0, 2)
        if tuple(stated.tolist()) != shape:
            raise CheckpointError(f"{module}.weight_shape says {tuple(stated.tolist())} and the model has {shape}")
        groups = None
        if self.ordered:
            g_idx = take(module, parts, "weight_g_idx", INT32, (columns,))
            groups = channel_groups(module, g_idx.read(0, columns), columns, self.group_size)
        zeros = None
        if not self.symmetric:
            words = take(module, parts, "weight_zero_point", INT32, (-(-rows // per_word), count))
            zeros = partial(_zeros, words, self.bits)
        return Grouped(
            module,
            shape,
            self.bits,
            self.group_size,
            integers=lambda start, stop: unpacked(packed.read(start, stop), self.bits)[:, :columns],
            scales=scale.read,
            scale_dtype=scale.dtype,
            zeros=zeros,
            groups=groups,
        ).source()


def _zeros(words: TensorSource, bits: int, start: int, stop: int) -> Tensor:
    return columns_unpacked(lambda first, last: words.read(first, last).t(), bits, start, stop).t()
