"""The binary folder's arrays: which files there are, what they are called, and their shapes.

Each file is one headerless little-endian array in C order.  A linear's matrix is stored transposed, [in, out]; a rank's
file holds the rank's rows and columns of the hub's matrix (shard.LINEARS), transposed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from baichuan.config import STORAGE_TYPES, ModelConfig, QuantConfig, WeightOnly
from baichuan.quant.smoothquant import MODES
from baichuan.weights.shard import LINEARS

CONFIG_NAME = "config.ini"
STORAGE_DTYPES = dict(zip(STORAGE_TYPES, map(np.dtype, ("<f4", "<f2")), strict=True))  # config.ini's weight_data_type
FLOAT32, FLOAT16, INT8, UINT8 = np.dtype("<f4"), np.dtype("<f2"), np.dtype("i1"), np.dtype("u1")

GLOBAL_NAMES = {
    "model.embed_tokens.weight": "vocab_embedding.weight.bin",
    "model.norm.weight": "ln_f.weight.bin",
    "lm_head.weight": "lm_head.weight.bin",
}
NORM_NAMES = {"input_layernorm": "input_layernorm", "post_attention_layernorm": "post_layernorm"}
MODULE_NAMES = {  # in TensorRT-LLM's words "fc" is the gate projection and "gate" the up projection
    "self_attn.W_pack": "attention.query_key_value",
    "self_attn.o_proj": "attention.dense",
    "mlp.gate_proj": "mlp.fc",
    "mlp.up_proj": "mlp.gate",
    "mlp.down_proj": "mlp.proj",
}
CHANNEL_SCALES = ("scale_w_quant_orig", "scale_y_accum_quant")
QKV = "self_attn.W_pack"
LINEAR_OF = {module: linear for linear in LINEARS.values() for module in linear.modules}


@dataclass(frozen=True)
class Array:
    """One file of the folder."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Size in bytes."""
        return int(np.prod(self.shape)) * self.dtype.itemsize


@dataclass(frozen=True)
class Layout:
    """Every array that a folder for `tp_size` ranks can have."""

    model: ModelConfig
    tp_size: int
    storage: np.dtype  # type of the weights that are not quantised

    def global_array(self, hub_name: str) -> Array:
        hidden, vocab = self.model.hidden_size, self.model.vocab_size
        shape = (hidden,) if hub_name == "model.norm.weight" else (vocab, hidden)
        return Array(GLOBAL_NAMES[hub_name], self.storage, shape)

    def norm(self, layer: int, hub_norm: str) -> Array:
        name = f"model.layers.{layer}.{NORM_NAMES[hub_norm]}.weight.bin"
        return Array(name, self.storage, (self.model.hidden_size,))

    def weight(self, layer: int, module: str, rank: int, kind: str = "") -> Array:
        """A rank's matrix: kind "" as stored, "int8" per tensor, "int8.col" per output channel."""
        rows, columns = self.cut(module, rank)
        shape = (columns[1] - columns[0], sum(stop - start for start, stop in rows))
        suffix = f"{kind}.{rank}" if kind else f"{rank}"
        return Array(self._name(layer, module, f"weight.{suffix}"), INT8 if kind else self.storage, shape)

    def input_scale(self, layer: int, module: str) -> Array:
        return Array(self._name(layer, module, "scale_x_orig_quant"), FLOAT32, (1,))

    def output_scale(self, layer: int, module: str) -> Array:
        return Array(self._name(layer, module, "scale_y_quant_orig"), FLOAT32, (1,))

    def channel_scale(self, layer: int, module: str, rank: int, kind: str, per_channel: bool) -> Array:
        """Scales of a rank's output channels.  kind: one of CHANNEL_SCALES.

        Per tensor it is one number, except for QKV, where q, k and v have one each, repeated over their channels.
        Where the input channels are cut, all ranks share one file.
        """
        linear, out_features = LINEAR_OF[module], self.weight(layer, module, rank).shape[1]
        spread = per_channel or linear.projections > 1
        own = spread and linear.axis == 0
        suffix = kind + (".col" if per_channel else "") + (f".{rank}" if own else "")
        return Array(self._name(layer, module, suffix), FLOAT32, (out_features,) if spread else (1,))

    def smoother(self, layer: int, module: str, rank: int) -> Array:
        start, stop = self.cut(module, rank)[1]
        return Array(self._name(layer, module, f"smoother.{rank}"), FLOAT32, (stop - start,))

    def smoothing(self, layer: int, linear: str) -> dict[str, Array]:
        """The fields of smoothquant.Smoothing of one of shard.LINEARS, whole, one after another for each of MODES.

        Our addition to the format: `-sq auto` keeps the matrices as they are, and build.py smooths them for its mode.
        """
        modules = LINEARS[linear].modules
        projections = LINEARS[linear].projections * len(modules)
        shapes = {"smoother": self.hub_shape(modules[0])[1], "input_scale": 1, "weight_scales": projections}
        return {
            field: Array(self._name(layer, modules[0], f"smoothing.{field}"), FLOAT32, (len(MODES), size))
            for field, size in shapes.items()
        }

    def kv_scale(self, layer: int, which: str) -> Array:
        """which: "k" or "v".  Our addition to the format: the old script has output_scale(QKV) for both."""
        return Array(self._name(layer, QKV, f"scale_{which}_quant_orig"), FLOAT32, (1,))

    def weight_only(self, layer: int, module: str, form: WeightOnly) -> dict[str, Array]:
        """The fields of records.Int8Weight or Int4Weight, whole and in the hub's order of rows, for all ranks alike.

        Our addition to the format: the scales are known only with the integers that calibration found.
        """
        rows, columns = self.hub_shape(module)
        name = partial(self._name, layer, module)
        if form.precision == "int8":
            return {
                "weight": Array(name("weight_only.weight"), INT8, (rows, columns)),
                "scale": Array(name("weight_only.scale"), FLOAT32, (rows,)),
            }
        groups = rows, columns // (form.group_size or columns)
        zero = {"zero": Array(name("weight_only.zero"), INT8, groups)} if form.zero_points else {}
        return {
            "packed": Array(name("weight_only.packed"), UINT8, (rows, columns // 2)),
            "scale": Array(name("weight_only.scale"), FLOAT16, groups),
            **zero,
        }

    def cut(self, module: str, rank: int):
        """The row ranges and the column range of the hub's matrix that the rank's file holds."""
        return LINEAR_OF[module].cut(self.hub_shape(module), rank, self.tp_size)

    def hub_shape(self, module: str) -> tuple[int, int]:
        """[out_features, in_features] of the hub's matrix."""
        hidden, inter = self.model.hidden_size, self.model.intermediate_size
        shapes = {"self_attn.W_pack": (3 * hidden, hidden), "self_attn.o_proj": (hidden, hidden)}
        return shapes.get(module) or ((hidden, inter) if module == "mlp.down_proj" else (inter, hidden))

    def written(self, smoothed: bool, form: WeightOnly | None = None, by_mode: bool = False) -> Iterator[Array]:
        """Every array of a conversion, with a number for -sq (smoothed), with -sq auto (by_mode) or with -kv alone;
        form: of calibrated integers, if any."""
        for hub_name in GLOBAL_NAMES:
            yield self.global_array(hub_name)
        for layer in range(self.model.num_layers):
            for hub_norm in NORM_NAMES:
                yield self.norm(layer, hub_norm)
            for which in ("k", "v"):
                yield self.kv_scale(layer, which)
            if by_mode:
                yield from self._smoothings(layer)
            for module in MODULE_NAMES:
                if form:
                    yield from self.weight_only(layer, module, form).values()
                int8 = smoothed or module == QKV
                if int8:
                    yield self.input_scale(layer, module)
                    yield self.output_scale(layer, module)
                for rank in range(self.tp_size):
                    yield self.weight(layer, module, rank)
                    if int8:
                        yield from self._int8_arrays(layer, module, rank)
                    if smoothed and has_smoother(module):
                        yield self.smoother(layer, module, rank)

    def _int8_arrays(self, layer: int, module: str, rank: int) -> Iterator[Array]:
        for per_channel in (False, True):
            yield self.weight(layer, module, rank, int8_kind(per_channel))
            for kind in CHANNEL_SCALES:
                yield self.channel_scale(layer, module, rank, kind, per_channel)

    def _smoothings(self, layer: int) -> Iterator[Array]:
        for linear in LINEARS:
            yield from self.smoothing(layer, linear).values()

    def required(
        self, quant: QuantConfig, ranks: range, smoothed: bool, form: WeightOnly | None = None, by_mode: bool = False
    ) -> Iterator[Array]:
        """The arrays that engines for `ranks` are built from.

        smoothed: the folder's weights are; form: of its calibrated integers, which are then read; by_mode: the weights
        are smoothed as the mode of `quant` needs it
        """
        for hub_name in GLOBAL_NAMES:
            yield self.global_array(hub_name)
        for layer in range(self.model.num_layers):
            for hub_norm in NORM_NAMES:
                yield self.norm(layer, hub_norm)
            if by_mode:
                yield from self._smoothings(layer)
            for module in MODULE_NAMES:
                if form:
                    yield from self.weight_only(layer, module, form).values()
                    continue
                for rank in ranks:
                    int8 = quant.weights == "smooth_quant" and not by_mode
                    yield from self._required_linear(layer, module, rank, quant, int8, smoothed)
            if quant.kv_cache != "none":
                yield self.output_scale(layer, QKV)

    def _required_linear(self, layer: int, module: str, rank: int, quant: QuantConfig, int8: bool, smoothed: bool):
        if int8:
            yield self.weight(layer, module, rank, int8_kind(quant.per_channel))
            yield self.channel_scale(layer, module, rank, "scale_w_quant_orig", quant.per_channel)
            if not quant.per_token:
                yield self.input_scale(layer, module)
        else:
            yield self.weight(layer, module, rank)
        if smoothed and has_smoother(module):
            yield self.smoother(layer, module, rank)

    def _name(self, layer: int, module: str, suffix: str) -> str:
        return f"model.layers.{layer}.{MODULE_NAMES[module]}.{suffix}.bin"


def int8_kind(per_channel: bool) -> str:
    return "int8.col" if per_channel else "int8"


def has_smoother(module: str) -> bool:
    """Whether the smoother is kept, because no norm before the module absorbs it: its input channels are cut."""
    return LINEAR_OF[module].axis == 1
