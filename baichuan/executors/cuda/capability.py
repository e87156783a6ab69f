"""What an engine's types of numbers ask of a GPU."""

from __future__ import annotations

import torch

from baichuan.config import QuantConfig
from baichuan.errors import UnsupportedError
from baichuan.weights.types import FP8, TYPES, Numbers

BFLOAT16 = Numbers("bfloat16", (8, 0), "build with --dtype float16")


def require_numbers(quant: QuantConfig, dtype: str, device: torch.device) -> None:
    """Raise UnsupportedError where the kernels cannot multiply the engine's numbers on this GPU.

    dtype: of the model, by its name
    """
    have, name = torch.cuda.get_device_capability(device), torch.cuda.get_device_name(device)
    needed = [TYPES[quant.weights].numbers]
    needed += [FP8] if quant.kv_cache == "fp8" else []
    needed += [BFLOAT16] if dtype == "bfloat16" else []
    for numbers in needed:
        if numbers is not None and have < numbers.compute_capability:
            raise UnsupportedError(
                f"{name} has compute capability {have[0]}.{have[1]} and {numbers.name} needs "
                f"{numbers.compute_capability[0]}.{numbers.compute_capability[1]}; {numbers.instead}"
            )
