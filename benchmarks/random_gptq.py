"""A matrix of random weights as the tools of GPTQ store it, in 4 bits."""

from __future__ import annotations

import torch
from torch import Tensor

from baichuan.weights.source import TensorSource

GROUP_SIZE = 128
SETTINGS = {"quant_method": "gptq", "bits": 4, "group_size": GROUP_SIZE, "sym": False, "desc_act": False}
DEVIATION = (255 / 12) ** 0.5  # standard deviation of integers from 0 to 15, each as likely
ROWS = 64  # enough to know the standard deviation of the matrix in whose place this one stands


def gptq_tensors(name: str, source: TensorSource, seed: int) -> dict[str, Tensor]:
    """The tensors that take the place of the matrix `name`, [out, in], with its standard deviation.

    qweight [in / 8, out] and qzeros [in / group, out / 8] hold eight integers in each int32, the first in the lowest
    bits; scales [in / group, out] in float16.  The format stores each zero less 1; they are 7 or 8 here.
    """
    (out, width), stem = source.shape, name.removesuffix("weight")
    groups = -(-width // GROUP_SIZE)
    generator = torch.Generator().manual_seed(seed)

    def words(rows: int, columns: int) -> Tensor:
        return torch.randint(-(1 << 31), 1 << 31, (rows, columns), generator=generator, dtype=torch.int32)

    scale = source.read(0, ROWS).float().std() / DEVIATION
    return {
        f"{stem}qweight": words(width // 8, out),
        f"{stem}qzeros": (words(groups, out // 8) & 0x11111111) + 0x66666666,
        f"{stem}scales": torch.full((groups, out), scale.item(), dtype=torch.float16),
        f"{stem}g_idx": torch.arange(width, dtype=torch.int32) // GROUP_SIZE,
    }
