"""The scales of an 8-bit linear as the binary folder has them: T per tensor, C per output channel."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

SMALLEST = 1e-20  # lower bound of a range, so that zeros have a finite scale


def int8_scales(x_absmax: Tensor, y_absmax: Tensor, weight_absmax: Tensor, projections: int) -> Mapping[str, Tensor]:
    """Every scale of one linear, in float32.

    x_absmax: the largest |input|; y_absmax: the largest |output|; weight_absmax: [out_features], each row's largest;
    projections: 3 for QKV, whose per-tensor scales are one for each of q, k and v, else 1.

    scale_w_orig_quant = 127 / max|W|  (T: the same within a projection, C: of each row)
    scale_w_quant_orig = 1 / scale_w_orig_quant
    scale_x_orig_quant = 127 / max|x|,  scale_y_quant_orig = max|y| / 127
    scale_y_accum_quant = (127 / max|y|) / (scale_x_orig_quant * scale_w_orig_quant)
    """
    channels = weight_absmax.double().clamp(min=SMALLEST)
    of_projection = channels.view(projections, -1)  # [projections, channels of each]
    tensors = of_projection.amax(1, keepdim=True).expand_as(of_projection).flatten()
    x_scale = 127 / x_absmax.double().clamp(min=SMALLEST)
    y_scale = 127 / y_absmax.double().clamp(min=SMALLEST)
    scales = {"scale_x_orig_quant": x_scale, "scale_y_quant_orig": 1 / y_scale}
    for suffix, absmax in (("", tensors), (".col", channels)):
        weight_scale = 127 / absmax
        scales[f"scale_w_orig_quant{suffix}"] = weight_scale
        scales[f"scale_w_quant_orig{suffix}"] = 1 / weight_scale
        scales[f"scale_y_accum_quant{suffix}"] = y_scale / (x_scale * weight_scale)
    return {name: scale.float() for name, scale in scales.items()}


def to_int8(rows: Tensor, scale: Tensor) -> Tensor:
    """clip(round(rows * scale), -127, 127).  rows: [n, in_features] float32; scale: [n], scale_w_orig_quant"""
    return (rows * scale[:, None]).round_().clamp_(-127, 127).to(torch.int8)
