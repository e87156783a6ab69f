"""SmoothQuant (https://arxiv.org/abs/2211.10438): 8-bit weights and activations, outliers moved into the weights.

x @ Wᵀ = (x / s) @ (W * s)ᵀ for any s > 0 per input channel; s is chosen so that both factors quantise well.
"""

from __future__ import annotations

import torch
from torch import Tensor

from baichuan.parallel.comm import Communicator
from baichuan.quant.scaled import quantise, scale_for
from baichuan.records import SmoothQuantWeight

SMALLEST = 1e-5  # lower bound of a smoother and of max|W| in its formula
ALPHAS = (0.5, 0.8, 0.3, 0.4, 0.6, 0.7, 0.9)  # that `-sq auto` chooses from; of equal ones the first
EXACT_CHANNELS = 1024  # 127² * 1024 < 2²⁴: a float32 product over up to this many int8 channels is exact


def smoother(x_absmax: Tensor, weight_absmax: Tensor, alpha: float) -> Tensor:
    """s = max|x|^alpha / max|W|^(1 - alpha), at least 1e-5, each maximum taken for one input channel.

    x_absmax, weight_absmax: [in_features] -> [in_features] float32.  alpha 0 evens out the weights, 1 the inputs.
    """
    x, weight = x_absmax.double(), weight_absmax.double().clamp(min=SMALLEST)
    return (x**alpha / weight ** (1 - alpha)).clamp(min=SMALLEST).float()


def choose_alpha(x: Tensor, weight: Tensor, x_absmax: Tensor) -> float:
    """The strength of ALPHAS whose 8-bit product leaves the least squared error, with scales per token and channel.

    x: [num_tokens, in_features] float32, some inputs; weight: [out_features, in_features] float32;
    x_absmax: [in_features], over all inputs
    """
    exact, weight_absmax = x @ weight.t(), weight.abs().amax(0)
    errors = []
    for alpha in ALPHAS:
        factor = smoother(x_absmax, weight_absmax, alpha)
        values = [_rounded(x / factor), _rounded(weight * factor)]
        errors.append((values[0] @ values[1].t() - exact).square().sum(dtype=torch.float64))
    return ALPHAS[int(torch.stack(errors).argmin())]


def _rounded(rows: Tensor) -> Tensor:
    """What int8 with a scale for each row makes of the rows."""
    scale = scale_for(rows.abs().amax(-1, keepdim=True), torch.int8)
    return quantise(rows, scale, torch.int8).float() * scale


def quantise_input(x: Tensor, weight: SmoothQuantWeight, comm: Communicator) -> tuple[Tensor, Tensor]:
    """x / smoother as integers and their scale.

    x: [num_tokens, in_features] -> int8 [num_tokens, in_features], float32 [num_tokens, 1] or [1].
    The scale is static, or max|x / smoother| / 127 of each token.  A weight with a smoother holds a rank's share of
    the input channels (o_proj, down_proj); a token's maximum is then taken over the ranks, so that every
    tensor-parallel size has the same integers.
    """
    x = x.float() if weight.smoother is None else x.float() / weight.smoother
    scale = weight.input_scale
    if scale is None:
        absmax = x.abs().amax(-1, keepdim=True)
        scale = scale_for(absmax if weight.smoother is None else comm.all_reduce_max(absmax), torch.int8)
    return quantise(x, scale, torch.int8), scale


def int8_matmul(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weightᵀ, exact.  x: [num_tokens, in_features] int8; weight: [out_features, in_features] int8 -> int32"""
    total = torch.zeros(x.shape[0], weight.shape[0], dtype=torch.int32, device=x.device)
    for start in range(0, x.shape[1], EXACT_CHANNELS):
        channels = slice(start, start + EXACT_CHANNELS)
        total += (x[:, channels].float() @ weight[:, channels].float().T).to(torch.int32)
    return total
