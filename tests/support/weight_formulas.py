"""A weight record of each kind, and its product in float64 by the formula of records.py."""

from __future__ import annotations

import numpy as np
import torch
from drawn import normal

from baichuan.quant.weight_only import quantise_int4, quantise_int8
from baichuan.records import DenseWeight, Fp8Weight, Int4Weight, Int8Weight, SmoothQuantWeight


def weights(kind, out_features=48, in_features=64, seed=3, dtype=torch.float32):
    """A weight record of a model in `dtype`, and a float64 function of x that is the formula of records.py."""
    matrix = normal(out_features, in_features, seed=seed, dtype=dtype).float() / in_features**0.5
    if kind == "dense":
        matrix = matrix.to(dtype)
        return DenseWeight(matrix), lambda x: x @ matrix.double().T
    if kind == "int8":
        q, scale = quantise_int8(matrix)
        return Int8Weight(q, scale), lambda x: (x @ q.double().T) * scale.double()
    if kind.startswith("int4"):
        packed, scale = quantise_int4(matrix, 32 if "group" in kind else 0, dtype)
        low, high = (packed & 15).long(), (packed >> 4).long()
        q = torch.stack((low, high), -1).flatten(1)
        q = torch.where(q > 7, q - 16, q).double()
        zero = None
        if "zero" in kind:
            zero = normal(*scale.shape, seed=7).mul(4).round().clamp(-16, 16).to(torch.int8)
            q -= zero.double().repeat_interleave(in_features // scale.shape[1], 1)
        dense = (q.unflatten(1, (scale.shape[1], -1)) * scale.double()[..., None]).flatten(1)
        return Int4Weight(packed, scale, zero), lambda x: x @ dense.T
    smoother = (normal(in_features, seed=4).abs() + 0.5) if "smoother" in kind else None
    static = torch.tensor([0.02]) if "static" in kind or kind == "fp8" else None
    if kind.startswith("fp8"):
        scale = matrix.abs().amax(1) / 448 if "token" in kind else torch.full((out_features,), 0.001)
        q = (matrix / scale[:, None]).clamp(-448, 448).to(torch.float8_e4m3fn)

        def fp8(x):
            s = x.abs().amax(1, keepdim=True) / 448 if static is None else static.double()
            x8 = (x / s).clamp(-448, 448).float().to(torch.float8_e4m3fn).double()
            return (x8 @ q.double().T) * s * scale.double()

        return Fp8Weight(q, scale, static), fp8
    q, scale = quantise_int8(matrix)

    def smooth_quant(x):
        x = x.numpy() / (1.0 if smoother is None else smoother.double().numpy())
        s = static.double().numpy() if static is not None else np.abs(x).max(1, keepdims=True) / 127
        x8 = np.clip(np.rint(x / s), -127, 127)
        return torch.from_numpy(x8 @ q.double().numpy().T * s) * scale.double()

    return SmoothQuantWeight(q, scale, static, smoother), smooth_quant
