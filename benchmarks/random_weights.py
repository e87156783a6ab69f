"""One rank's weights of any precision, drawn on the device itself: full-size models in seconds, nothing on disk.

Activations stay of order 1 and no two matrices are alike, so that caches and compression gain nothing.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from baichuan.cli.memory_flags import add_weight_copies
from baichuan.config import PRESETS, ModelConfig, QuantConfig
from baichuan.quant.weight_only import pack_int4
from baichuan.records import (
    DenseWeight,
    Fp8Weight,
    Int4Weight,
    Int8Weight,
    LayerWeights,
    ModelWeights,
    SmoothQuantWeight,
    Weight,
)

PRECISIONS = {
    "float16": QuantConfig(),
    "bfloat16": QuantConfig(),
    "int8": QuantConfig("int8"),
    "int4": QuantConfig("int4", group_size=32),
    "int4_per_channel": QuantConfig("int4"),
    "int4_g64": QuantConfig("int4", group_size=64),
    "int4_g128": QuantConfig("int4", group_size=128),
    "int4_zeros": QuantConfig("int4", group_size=32, zero_points=True),
    "int4_g64_zeros": QuantConfig("int4", group_size=64, zero_points=True),
    "int4_g128_zeros": QuantConfig("int4", group_size=128, zero_points=True),
    "smooth_quant": QuantConfig("smooth_quant", per_channel=True),
    "smooth_quant_per_token": QuantConfig("smooth_quant", per_channel=True, per_token=True),
    "fp8": QuantConfig("fp8"),
    "fp8_per_token": QuantConfig("fp8", per_channel=True, per_token=True),
}
INT8_DEVIATION = 73.3  # standard deviation of uniform integers in [-127, 127]
INT4_DEVIATION = 4.3  # standard deviation of uniform integers in [-7, 7]; a mean of its own would overflow float16


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Which models a benchmark goes through, and with which prompts."""
    parser.add_argument(
        "--model_version", nargs="+", choices=tuple(PRESETS), default=["v1_7b"], help="versions whose shapes are taken"
    )
    parser.add_argument(
        "--precision", nargs="+", choices=tuple(PRECISIONS), default=["float16"], help="precisions of the weights"
    )
    parser.add_argument("--batch_size", nargs="+", type=int, default=[1], help="sequences at a time")
    parser.add_argument("--input_len", type=int, default=128, help="tokens of each prompt")


def add_kv_cache(parser: argparse.ArgumentParser) -> None:
    types = ("none", "int8", "fp8")
    parser.add_argument("--kv_cache", choices=types, default="none", help="data type of the cache; none = the model's")


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    """What the benchmarks that generate ask of an engine of such weights, and where their results go."""
    add_kv_cache(parser)
    parser.add_argument("--num_layers", type=int, default=0, help="of a shortened model; 0 = all")
    parser.add_argument("--max_num_tokens", type=int, default=16384, help="tokens of a step at most")
    add_weight_copies(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="file for the results")


class RandomWeights:
    """Draws the parts of a model; the same seed gives the same numbers on the same kind of device."""

    def __init__(self, model: ModelConfig, quant: QuantConfig, device: torch.device | str, seed: int = 0):
        self.model, self.quant, self.device = model, quant, torch.device(device)
        self.dtype = getattr(torch, model.dtype)
        self.seed = seed
        self.generator = torch.Generator(self.device).manual_seed(seed)

    def rank(self, tp_size: int = 1, rank: int = 0) -> ModelWeights:
        """The weights of rank `rank` of tp_size: its own shards, and the tensors that all ranks have in common."""
        model, quant = self.model, self.quant
        hidden, intermediate = model.hidden_size, model.intermediate_size // tp_size
        vocab_rows = -(-model.vocab_size // tp_size)
        kv_scale = self._full(1, 0.04) if quant.kv_cache == "int8" else self._full(1, 0.01)
        embedding = self._normal((model.vocab_size, hidden), 1.0)
        norms = [self._norm(hidden) for _ in range(2 * model.num_layers + 1)]
        self.generator.manual_seed(self.seed + 1 + rank)

        def layer(number: int) -> LayerWeights:
            return LayerWeights(
                input_norm=norms[2 * number],
                qkv=self.linear(3 * hidden // tp_size, hidden, absorbed=True),
                o_proj=self.linear(hidden, hidden // tp_size, absorbed=False),
                post_norm=norms[2 * number + 1],
                gate_up=self.linear(2 * intermediate, hidden, absorbed=True),
                down_proj=self.linear(hidden, intermediate, absorbed=False),
                k_scale=None if quant.kv_cache == "none" else kv_scale,
                v_scale=None if quant.kv_cache == "none" else kv_scale,
            )

        return ModelWeights(
            embedding=embedding,
            layers=tuple(layer(number) for number in range(model.num_layers)),
            norm=norms[-1],
            lm_head=self.linear(vocab_rows, hidden, True)
            if quant.quantize_lm_head
            else self._dense(vocab_rows, hidden),
        )

    def linear(self, out_features: int, in_features: int, absorbed: bool) -> Weight:
        """A weight in the quantisation.  absorbed: its SmoothQuant smoother is part of the norm before it."""
        shape, deviation = (out_features, in_features), in_features**-0.5
        match self.quant.weights:
            case "none":
                return self._dense(*shape)
            case "int8":
                return Int8Weight(
                    self._integers(shape, -127, 128), self._full(out_features, deviation / INT8_DEVIATION)
                )
            case "int4":
                groups = in_features // (self.quant.group_size or in_features)
                packed = pack_int4(self._integers(shape, -7, 8))
                scale = torch.full(
                    (out_features, groups), deviation / INT4_DEVIATION, dtype=self.dtype, device=self.device
                )
                zero = self._integers((out_features, groups), -2, 3) if self.quant.zero_points else None
                return Int4Weight(packed, scale, zero)
            case "smooth_quant":
                return SmoothQuantWeight(
                    weight=self._integers(shape, -127, 128),
                    scale=self._full(out_features, deviation / INT8_DEVIATION),
                    input_scale=None if self.quant.per_token else self._full(1, 0.03),
                    smoother=None if absorbed else self._full(in_features, 1.0),
                )
            case "fp8":
                weight = self._normal(shape, 16.0).to(torch.float8_e4m3fn)
                input_scale = None if self.quant.per_token else self._full(1, 0.02)
                return Fp8Weight(weight, self._full(out_features, deviation / 16), input_scale)
        raise ValueError(self.quant.weights)

    def _dense(self, out_features: int, in_features: int) -> DenseWeight:
        return DenseWeight(self._normal((out_features, in_features), in_features**-0.5))

    def _norm(self, width: int) -> Tensor:
        return 1 + self._normal((width,), 0.1)

    def _normal(self, shape: tuple[int, ...], deviation: float) -> Tensor:
        x = torch.empty(shape, dtype=self.dtype, device=self.device)
        return x.normal_(0, deviation, generator=self.generator)

    def _integers(self, shape: tuple[int, ...], low: int, high: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int8, device=self.device).random_(low, high, generator=self.generator)

    def _full(self, size: int, value: float) -> Tensor:
        return torch.full((size,), value, dtype=torch.float32, device=self.device)
