"""SmoothQuant (https://arxiv.org/abs/2211.10438): 8-bit weights and activations, outliers moved into the weights.

x @ Wᵀ = (x / s) @ (W * s)ᵀ for any s > 0 per input channel; s is chosen so that both factors quantise well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from baichuan.parallel.comm import Communicator
from baichuan.quant.scaled import quantise, scale_for
from baichuan.records import SmoothQuantWeight

SMALLEST = 1e-5  # lower bound of a smoother and of max|W| in its formula
BLOCK_ELEMENTS = 1 << 22  # elements of the rows that are quantised at a time
EXACT_CHANNELS = 1024  # 127² * 1024 < 2²⁴: a float32 product over up to this many int8 channels is exact


@dataclass(frozen=True)
class Mode:
    """Where an engine has scales of its own (build.py's --per_token and --per_channel)."""

    per_token: bool  # one activation scale for each token, taken at run time; else a calibrated one for all
    per_channel: bool  # one weight scale for each output channel; else one for a projection


MODES = tuple(Mode(per_token, per_channel) for per_token in (False, True) for per_channel in (False, True))


@dataclass(frozen=True)
class Smoothing:
    """How one linear is smoothed for one mode."""

    smoother: Tensor  # [in_features] float32
    input_scale: Tensor  # [1] float32, of all tokens
    weight_scales: Tensor  # [projections] float32, each of all its output channels


def smoother(x_absmax: Tensor, weight_absmax: Tensor, alpha: float) -> Tensor:
    """s = max|x|^alpha / max|W|^(1 - alpha), at least 1e-5, each maximum taken for one input channel.

    x_absmax, weight_absmax: [in_features] -> [in_features] float32.  alpha 0 evens out the weights, 1 the inputs.
    """
    x, weight = x_absmax.double(), weight_absmax.double().clamp(min=SMALLEST)
    return (x**alpha / weight ** (1 - alpha)).clamp(min=SMALLEST).float()


def smoothing(x_absmax: Tensor, factor: Tensor, row_absmax: Tensor, projections: int) -> Smoothing:
    """The scales that go with a smoother.

    x_absmax, factor: [in_features], max|x| and the smoother; row_absmax: [out_features], max|W * factor| of each row;
    projections: equal blocks of the rows
    """
    of_projections = row_absmax.view(projections, -1).amax(1)
    return Smoothing(factor, _input_scale(x_absmax, factor), scale_for(of_projections, torch.int8))


def _input_scale(x_absmax: Tensor, factor: Tensor) -> Tensor:
    return scale_for((x_absmax / factor).amax()[None], torch.int8)


def quantise_smoothed(rows: Tensor, factor: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rows of a smoothed weight as integers, and each row's scale.

    rows: [n, in_features]; factor: [in_features], the smoother; scale: one for all rows, None = max|row| / 127 of each
    -> int8 [n, in_features], float32 [n]
    """
    smoothed = rows.float() * factor
    scales = scale_for(smoothed.abs().amax(1), torch.int8) if scale is None else scale.expand(len(rows))
    return quantise(smoothed, scales[:, None], torch.int8), scales


def smooth_weight(weight: Tensor, x_absmax: Tensor, factor: Tensor, mode: Mode, projections: int) -> SmoothQuantWeight:
    """A whole matrix in one mode, whose input is smoothed by itself and not by a norm.

    weight: [out_features, in_features]; x_absmax, factor: [in_features], max|x| and the smoother; projections: equal
    blocks of the rows
    """
    rows = max(1, BLOCK_ELEMENTS // weight.shape[1])
    blocks = [projection.split(rows) for projection in weight.chunk(projections)]
    scales: Sequence[Tensor | None] = [None] * projections
    if not mode.per_channel:
        row_absmax = torch.cat([(block * factor).abs_().amax(1) for each in blocks for block in each])
        scales = list(smoothing(x_absmax, factor, row_absmax, projections).weight_scales)
    pairs = [(block, scale) for each, scale in zip(blocks, scales, strict=True) for block in each]
    quantised = (quantise_smoothed(block, factor, scale) for block, scale in pairs)
    q, row_scales = (torch.cat(parts) for parts in zip(*quantised, strict=True))
    return SmoothQuantWeight(q, row_scales, None if mode.per_token else _input_scale(x_absmax, factor), factor)


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
