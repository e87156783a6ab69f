"""The CUDA executor's ops against the reference executor on tiny models of every precision: in Triton's interpreter
and float32, or on the GPU where there is one.
"""

import pytest
import torch
from kernel_device import DEVICE, MARKS, relative_error, to_device
from scattered import scattered

from baichuan.config import ModelConfig, QuantConfig
from baichuan.executors.cpu.reference import ReferenceExecutor
from baichuan.executors.cuda.ops import CudaOps, Switches
from baichuan.executors.memory import KV_DTYPES
from baichuan.model.decoder import attention_spec, forward
from baichuan.parallel.comm import Solo
from baichuan.records import Step
from benchmarks.random_weights import RandomWeights

pytestmark = MARKS

FLOAT32_SUMS = 1e-5  # another order of summation, through two layers
ROUNDED_INPUTS = 0.05  # an input that rounds to the neighbouring e4m3 number moves by a 16th
QUANTS = {
    "dense": (QuantConfig(), FLOAT32_SUMS),
    "int8": (QuantConfig("int8", quantize_lm_head=True), FLOAT32_SUMS),
    "int4": (QuantConfig("int4"), FLOAT32_SUMS),
    "int4 in groups": (QuantConfig("int4", group_size=32), FLOAT32_SUMS),
    "smooth_quant": (QuantConfig("smooth_quant"), ROUNDED_INPUTS),
    "smooth_quant per token": (QuantConfig("smooth_quant", per_token=True), ROUNDED_INPUTS),
    "fp8": (QuantConfig("fp8"), ROUNDED_INPUTS),
    "fp8 per token": (QuantConfig("fp8", per_token=True, per_channel=True), ROUNDED_INPUTS),
    "int8 cache": (QuantConfig(kv_cache="int8"), ROUNDED_INPUTS),
}
HALF = {"int8": 5e-3, "int4": 5e-3, "int4 in groups": 5e-3}  # a few roundings of 2^-11
CASES = [*((name, "float32") for name in QUANTS), *((name, "float16") for name in HALF)]
CAPACITY = 24


def tiny_model(version, quant, dtype="float32"):
    """7B: RoPE, 13B: ALiBi.  One layer where the interpreter takes seconds for it."""
    num_layers = 2 if quant.weights == "none" else 1
    return ModelConfig(version, 64, num_layers, 2, 96, 34, dtype=dtype)


class OnDevice:
    """CudaOps with its caches, as CudaExecutor has them, on any device."""

    def __init__(self, model, quant, weights, rows, switches):
        self.model, self.weights = model, weights
        self.spec = attention_spec(model, 0, 1)
        self.ops = CudaOps(self.spec, Solo(), CAPACITY, DEVICE, switches)
        dtype = KV_DTYPES[quant.kv_cache] or weights.embedding.dtype
        self.caches = [
            scattered(rows, CAPACITY, self.spec, dtype, DEVICE, (layer.k_scale, layer.v_scale))
            for layer in weights.layers
        ]

    def forward(self, step):
        with torch.inference_mode():
            return forward(self.ops, self.model, self.weights, self.caches, self.spec, step)


ONE, THREE = [[3, 1, 4, 1]], [[9, 2, 6], [5], [3, 5]]


@pytest.mark.parametrize(
    "version, prompts, own",
    [("v1_7b", ONE, True), ("v2_13b", THREE, True), ("v1_7b", THREE, False)],
    ids=["7B, one row", "13B, three rows", "7B, PyTorch's own kernels"],
)
@pytest.mark.parametrize("quant, dtype", CASES)
def test_logits_are_the_reference_executors(version, prompts, own, quant, dtype):
    if dtype == "float16" and not own and DEVICE.type == "cpu":
        pytest.skip("PyTorch has no product of float16 to float32 on the CPU")
    tolerance = HALF[quant] if dtype == "float16" else QUANTS[quant][1]
    quant = QUANTS[quant][0]
    model = tiny_model(version, quant, dtype)
    weights = RandomWeights(model, quant, "cpu").rank()
    reference = ReferenceExecutor(model, quant, weights)
    reference.reset(len(prompts), CAPACITY)
    ours = OnDevice(model, quant, to_device(weights), len(prompts), Switches(own, own))
    step = Step.of(prompts, all_outputs=True)
    for _ in range(1 + model.num_layers):  # a prefill, then decode steps
        expected = reference.forward(step)
        assert relative_error(ours.forward(to_device(step)), expected) < tolerance
        step = step.next(expected[torch.isin(torch.arange(len(expected)), step.cu_seqlens[1:] - 1)].argmax(-1))


def test_the_tolerance_notices_a_wrong_weight():
    model = tiny_model("v1_7b", QuantConfig("int8"))
    weights, other = (RandomWeights(model, QuantConfig("int8"), "cpu", seed).rank() for seed in (0, 1))
    reference = ReferenceExecutor(model, QuantConfig("int8"), weights)
    reference.reset(1, CAPACITY)
    ours = OnDevice(model, QuantConfig("int8"), to_device(other), 1, Switches())
    step = Step.of([[1, 2, 3]])
    assert relative_error(ours.forward(to_device(step)), reference.forward(step)) > ROUNDED_INPUTS
