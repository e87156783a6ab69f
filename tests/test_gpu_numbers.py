"""A GPU that lacks an engine's types of numbers is refused in a sentence, where a kernel's compiler would fail."""

import pytest
import torch

from baichuan.config import QuantConfig
from baichuan.errors import UnsupportedError
from baichuan.executors.cuda.capability import require_numbers

DEVICE = torch.device("cuda", 0)


@pytest.mark.parametrize(
    "capability, quant, dtype, refused",
    [
        ((8, 0), QuantConfig("fp8"), "float16", "FP8 needs 8.9; build with --use_smooth_quant"),
        ((8, 6), QuantConfig(kv_cache="fp8"), "bfloat16", "FP8 needs 8.9"),
        ((8, 9), QuantConfig("fp8", kv_cache="fp8"), "bfloat16", None),
        ((7, 5), QuantConfig("int4"), "bfloat16", "bfloat16 needs 8.0; build with --dtype float16"),
        ((7, 5), QuantConfig("smooth_quant"), "float16", "INT8 needs 8.0; build with --weight_only_precision int4"),
        ((7, 5), QuantConfig("int4", kv_cache="int8"), "float16", None),
        ((10, 0), QuantConfig("fp8"), "bfloat16", None),  # 10 is more than 8, as a number
    ],
)
def test_what_a_gpu_lacks_is_said(capability, quant, dtype, refused, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A GPU")
    if refused is None:
        require_numbers(quant, dtype, DEVICE)
        return
    with pytest.raises(UnsupportedError) as error:
        require_numbers(quant, dtype, DEVICE)
    assert str(error.value).startswith("NVIDIA A GPU has compute capability {}.{} and".format(*capability))
    assert refused in str(error.value)
