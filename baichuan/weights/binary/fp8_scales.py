"""FP8 scales as an .npz file, in the format of the old example's --quantized_fp8_model_path.

For layer i and each module of MODULES there are two numbers, `_np:layers:{i}:{module}:activation_scaling_factor` and
`...:weights_scaling_factor`: the value ≈ e4m3 * factor, so that a factor is max|value| / 448.  We add
`...:attention:qkv:{k,v}:output_scaling_factor` for the FP8 KV cache; a file without them stands for 1.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from baichuan.errors import CheckpointError
from baichuan.text.rows import reason
from baichuan.util.files import open_regular
from baichuan.util.npy import read_array

MODULES = {  # the modules that one of shard.LINEARS merges, each an equal share of its rows
    "qkv": ("attention:qkv:q", "attention:qkv:k", "attention:qkv:v"),
    "o_proj": ("attention:dense",),
    "gate_up": ("mlp:fc", "mlp:gate"),
    "down_proj": ("mlp:proj",),
}
KV_MODULES = {"k_scale": "attention:qkv:k", "v_scale": "attention:qkv:v"}
FILE_NAME = "fp8_scales.npz"  # its name in a binary folder
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
ENCRYPTED = 0x1  # a flag of a member
MAX_MEMBER_BYTES = 4096  # a scale with its header is smaller; the file may hold whole weights beside them


@dataclass(frozen=True)
class LayerScales:
    """One layer's scales, by the names of MODULES and KV_MODULES."""

    activation: Mapping[str, float]
    weights: Mapping[str, float]
    kv: Mapping[str, float]

    def input_scale(self, linear: str) -> float:
        """Scale of the input that the linear's modules share: the largest of theirs."""
        return max(self.activation[module] for module in MODULES[linear])


def read_fp8_scales(path: Path, num_layers: int) -> list[LayerScales]:
    """The scales of every layer.  Raises CheckpointError for a missing one, or one that is not a positive number."""
    try:
        with open_regular(path) as file, zipfile.ZipFile(file) as archive:
            members = _Members(path, archive)
            return [_read_layer(members, layer) for layer in range(num_layers)]
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); name an .npz of FP8 scales") from None
    except CheckpointError:
        raise
    except Exception as error:  # zipfile raises many types for damage
        raise CheckpointError(
            f"{path} is not a readable .npz file ({reason(error)}); make the FP8 scales again"
        ) from None


def write_fp8_scales(path: Path, layers: list[LayerScales]) -> None:
    """The inverse of read_fp8_scales."""
    values: dict[str, Any] = {}
    for index, layer in enumerate(layers):
        for kind, scales in (("activation", layer.activation), ("weights", layer.weights)):
            for module, scale in scales.items():
                values[_key(index, module, kind)] = np.float32(scale)
        for name, scale in layer.kv.items():
            values[_key(index, KV_MODULES[name], "output")] = np.float32(scale)
    with open(path, "wb") as file:
        np.savez(file, **values)


class _Members:
    """Single numbers of an .npz archive."""

    def __init__(self, path: Path, archive: zipfile.ZipFile):
        self.path, self.archive = path, archive
        self.names = set(archive.namelist())

    def read(self, key: str, default: float | None = None) -> float:
        name = f"{key}.npy"
        if name not in self.names:
            if default is not None:
                return default
            raise CheckpointError(f"{self.path} has no {key}; the FP8 scales belong to another model, make them again")
        entry = self.archive.getinfo(name)
        if entry.file_size > MAX_MEMBER_BYTES:
            raise CheckpointError(f"{self.path} holds more than one number as {key}; make the FP8 scales again")
        if entry.flag_bits & ENCRYPTED or entry.compress_type not in METHODS:
            raise CheckpointError(
                f"{self.path} is encrypted or compressed otherwise than by NumPy; save it with np.savez"
            )
        with self.archive.open(name) as file:
            values = read_array(BytesIO(file.read(MAX_MEMBER_BYTES + 1)), 1)
        if values.size != 1 or values.dtype.kind != "f" or not 0 < values.item() < np.inf:
            raise CheckpointError(f"{self.path} holds a {key} that is not a positive number; make the FP8 scales again")
        return float(values.item())


def _read_layer(members: _Members, layer: int) -> LayerScales:
    modules = [module for linear in MODULES.values() for module in linear]
    return LayerScales(
        {module: members.read(_key(layer, module, "activation")) for module in modules},
        {module: members.read(_key(layer, module, "weights")) for module in modules},
        {name: members.read(_key(layer, module, "output"), default=1.0) for name, module in KV_MODULES.items()},
    )


def _key(layer: int, module: str, kind: str) -> str:
    return f"_np:layers:{layer}:{module}:{kind}_scaling_factor"
