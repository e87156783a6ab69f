"""What an engine's types of numbers ask of a GPU."""

from __future__ import annotations

import torch

from baichuan.config import QuantConfig
from baichuan.errors import UnsupportedError


def require_numbers(quant: QuantConfig, dtype: str, device: torch.device) -> None:
    """Raise UnsupportedError where the kernels cannot multiply the engine's numbers on this GPU.

    dtype: of the model, by its name
    """
    have, name = torch.cuda.get_device_capability(device), torch.cuda.get_device_name(device)
    for needed, what, wanted, instead in (
        ((8, 9), "FP8", "fp8" in (quant.weights, quant.kv_cache), "build with --use_smooth_quant or --int8_kv_cache"),
        ((8, 0), "INT8", quant.weights in ("int8", "smooth_quant"), "build with --weight_only_precision int4"),
        ((8, 0), "bfloat16", dtype == "bfloat16", "build with --dtype float16"),
    ):
        if wanted and have < needed:
            raise UnsupportedError(
                f"{name} has compute capability {have[0]}.{have[1]} and {what} needs {needed[0]}.{needed[1]}; {instead}"
            )
