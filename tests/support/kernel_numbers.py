"""What the kernels' tests multiply, and how far from float64 a result may be.

float16 results carry one rounding of 2^-11 (relative, worst case); ROUNDED leaves room for two of them in a row.
"""

from dataclasses import replace
from functools import partial

import drawn
import torch
from kernel_device import DEVICE

ROUNDED = 1e-3
FLOAT32 = 2e-6  # float32 sums of a few hundred terms
DTYPES = [torch.float16, torch.float32]


def bound(dtype) -> float:
    return {torch.float32: FLOAT32, torch.float16: ROUNDED, torch.bfloat16: 8 * ROUNDED}[dtype]  # three bits fewer


normal = partial(drawn.normal, dtype=torch.float16, device=DEVICE)


def value(x):
    """What an Int16 operand says, in float64."""
    high, low = x.values.double().unflatten(0, (-1, 2)).unbind(1)
    return (256 * high + low) * x.scale.double()[: len(high), None]  # sums may come after the scales


def interleaved(x):
    """A deinterleaved operand with its columns in their own order."""
    return replace(x, values=x.values.unflatten(-1, (2, -1)).mT.flatten(-2))
