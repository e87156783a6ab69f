"""The kernels that a step of a real model launches, without a GPU; to record them:
python tests/support/launches.py > tests/support/launches.txt

Tensors are on PyTorch's device "meta" and launches are written down instead of run, so that the model's own sizes cost
nothing.  A line is a launch: kernel, grid, constants, w(arps) and s(tages), arguments.  `product` and
`fp8_sums` are PyTorch's.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from baichuan.config import PRESETS, QuantConfig
from baichuan.executors.cuda import linear as cuda_linear
from baichuan.executors.cuda.dense_copies import DenseCopies
from baichuan.executors.cuda.ops import CudaOps, Switches
from baichuan.executors.memory import KV_DTYPES
from baichuan.kernels.spec import KernelSpec, plain_values
from baichuan.model.decoder import attention_spec, forward
from baichuan.parallel.comm import Solo
from baichuan.records import LayerCache, Step
from benchmarks.random_weights import RandomWeights

FILE = Path(__file__).with_suffix(".txt")
META = torch.device("meta")
CAPACITY = 512
QUANTS = {
    "float16": QuantConfig(),
    "int8": QuantConfig("int8", kv_cache="int8"),
    "int4": QuantConfig("int4", kv_cache="fp8"),
    "int4 in groups": QuantConfig("int4", group_size=32),
    "int4 with zeros": QuantConfig("int4", group_size=128, zero_points=True),
    "smooth_quant": QuantConfig("smooth_quant", per_channel=True),
    "smooth_quant per token": QuantConfig("smooth_quant", per_token=True, per_channel=True),
    "fp8": QuantConfig("fp8"),
    "fp8 per token": QuantConfig("fp8", per_token=True, per_channel=True),
}
STEPS = {"decode 1": (1, 1), "decode 8": (8, 1), "decode 64": (64, 1), "prefill 1 x 300": (1, 300)}
CASES = [
    *(("v2_13b", quant, step, "") for quant in QUANTS for step in STEPS),
    *(("v2_13b", quant, "prefill 1 x 300", "copies") for quant in ("int8", "int4")),
    ("v2_13b", "int8", "prefill 1 x 300", "PyTorch's products"),
    ("v1_7b", "float16", "decode 1", ""),
    ("v1_7b", "float16", "prefill 1 x 300", ""),
]


class Shapes(RandomWeights):
    """Weights with shapes and types but no values."""

    def __init__(self, model, quant):
        self.model, self.quant, self.device = model, quant, META
        self.dtype, self.seed = getattr(torch, model.dtype), 0
        self.generator = SimpleNamespace(manual_seed=lambda seed: None)

    def _normal(self, shape, deviation):
        return torch.empty(shape, dtype=self.dtype, device=META)

    def _integers(self, shape, low, high, dtype=torch.int8):
        return torch.empty(shape, dtype=dtype, device=META)


def launches(version: str, quant: str, step: str, variant: str) -> list[str]:
    """The launches of one step of a model with one layer."""
    model, config, (rows, new) = PRESETS[version], QUANTS[quant], STEPS[step]
    model, lines = type(model)(**{**vars(model), "num_layers": 1}), []

    def launch(spec, grid, inputs, scalars, outputs, constants, num_warps=4, num_stages=3):
        plain = ", ".join(f"{name} {value}" for name, value in plain_values(constants).items())
        values = " ".join([*map(_argument, inputs), *map(str, scalars), "->", *map(_argument, outputs)])
        lines.append(f"{spec.kernel.__name__} {list(grid)} {plain} w{num_warps} s{num_stages} {values}")

    def product(x, weight, out_dtype):
        lines.append(f"product {_argument(x)} {_argument(weight)}")
        return torch.empty(x.shape[0], weight.shape[0], dtype=out_dtype, device=META)

    weights, spec = Shapes(model, config).rank(), attention_spec(model, 0, 1)
    copies = DenseCopies(1 << 40 if variant == "copies" else 0)

    def fp8_sums(x, weight):
        lines.append(f"fp8_sums {_argument(x)} {_argument(weight)}")
        return torch.empty(x.shape[0], weight.shape[0], device=META)

    ops = CudaOps(spec, Solo(), CAPACITY, META, Switches(own_gemm=variant != "PyTorch's products"), copies)
    scales = weights.layers[0].k_scale, weights.layers[0].v_scale
    kv_dtype = KV_DTYPES[config.kv_cache] or torch.float16
    cache = LayerCache.whole_rows(rows, CAPACITY, spec, kv_dtype, META, scales, tokens_per_block=64)
    with (
        patch.object(KernelSpec, "launch", launch),
        patch.object(cuda_linear, "product", product),
        patch.object(cuda_linear, "fp8_sums", fp8_sums),
    ):
        forward(ops, model, weights, (cache,), spec, Step.of([[0] * new] * rows, device=META))
    return lines


def _argument(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}".replace(" ", "")


def title(case: tuple[str, ...]) -> str:
    return ", ".join(filter(None, case))


def recorded() -> dict[str, list[str]]:
    """The launches in launches.txt by the case's title."""
    parts = FILE.read_text().strip().split("\n\n")
    return {part.splitlines()[0]: part.splitlines()[1:] for part in parts}


if __name__ == "__main__":
    for each in CASES:
        print("\n".join([title(each), *launches(*each), ""]))
