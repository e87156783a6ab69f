"""The cases of row-wise kernels, which stand between the products: norms, the activation, quantisation and argmax."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from baichuan.errors import counted
from baichuan.executors.cpu.reference import ReferenceOps
from baichuan.kernels.argmax import argmax
from baichuan.kernels.norm import add_rms_norm
from baichuan.kernels.operand import PLAIN, E4m3PerToken, Form, Int8PerToken, Int16, Operand, StaticScale
from baichuan.kernels.rows import quantise_rows
from baichuan.kernels.silu import silu_mul
from baichuan.model.decoder import attention_spec
from baichuan.parallel.comm import Solo
from baichuan.quant.fp8 import token_scale
from baichuan.quant.scaled import quantise, scale_for
from benchmarks.kernel_cases import NEIGHBOUR, ROUNDED, Case, Sizes, normal

INT16_STEPS = 1e-4  # a rounding to multiples of max|row| / 32639
EPS = 1e-6


def cases(sizes: Sizes, device: torch.device) -> Iterator[Case]:
    reference = ReferenceOps(attention_spec(sizes.model, 0, 1), Solo(), 1, device)
    yield from _norms(sizes, device, reference)
    yield from _activations(sizes, device, reference)
    yield from _rows(sizes, device)


def _norms(sizes: Sizes, device: torch.device, reference: ReferenceOps) -> Iterator[Case]:
    width = sizes.model.hidden_size
    static = torch.full((1,), 0.03, device=device)
    kinds = {
        "float16": (PLAIN, ROUNDED[torch.float16]),
        "to int8, a scale per token": (Int8PerToken(), NEIGHBOUR),
        "to int8, one scale": (StaticScale(torch.int8, static), NEIGHBOUR),
        "to e4m3": (StaticScale(torch.float8_e4m3fn, static), NEIGHBOUR),
        "to e4m3, a scale per token": (E4m3PerToken(), NEIGHBOUR),
        "to int16": (Int16(), INT16_STEPS + ROUNDED[torch.float16]),
    }

    def make(tokens: int, seed: int) -> tuple:
        return tuple(normal(shape, device, seed + n) for n, shape in enumerate([(tokens, width)] * 2 + [(width,)]))

    for tokens in sizes.tokens:
        for kind, (form, tolerance) in kinds.items():
            yield Case(
                name=f"add_rms_norm {kind}, {counted(tokens, 'token')}",
                make=partial(make, tokens),
                run=lambda x, residual, weight, form=form: add_rms_norm(x, residual, weight, EPS, form),
                expected=lambda x, residual, weight, form=form: torch.cat(
                    _quantised_sum(reference.add_rms_norm(x, residual, weight, EPS), form)
                ),
                tolerance=tolerance,
                result=lambda raw, *_: torch.cat((_dequantised(raw[0]), raw[1].float())),
            )


def _activations(sizes: Sizes, device: torch.device, reference: ReferenceOps) -> Iterator[Case]:
    width = sizes.model.intermediate_size
    kinds = {
        "float16": (PLAIN, ROUNDED[torch.float16]),
        "to int8, a scale per token": (Int8PerToken(), NEIGHBOUR),
        "to int16": (Int16(), INT16_STEPS + ROUNDED[torch.float16]),
    }
    for tokens in sizes.tokens:
        for kind, (form, tolerance) in kinds.items():
            yield Case(
                name=f"silu_mul {kind}, {counted(tokens, 'token')}",
                make=partial(_one, (tokens, 2 * width), torch.float16, device),
                run=lambda x, form=form: silu_mul(x, form),
                expected=lambda x, form=form: _rounded(reference.silu_mul(x), form),
                tolerance=tolerance,
                result=_dequantised,
            )


def _rows(sizes: Sizes, device: torch.device) -> Iterator[Case]:
    width, vocab_size = sizes.model.hidden_size, sizes.model.vocab_size
    for tokens in sizes.tokens:
        for kind, form, tolerance in (("int8", Int8PerToken(), NEIGHBOUR), ("int16", Int16(), INT16_STEPS)):
            yield Case(
                name=f"quantise_rows to {kind}, {counted(tokens, 'token')}",
                make=partial(_one, (tokens, width), torch.float16, device),
                run=lambda x, form=form: quantise_rows(x, form),
                expected=lambda x, form=form: _rounded(x, form),
                tolerance=tolerance,
                result=_dequantised,
            )
    for rows in sizes.tokens[:2]:
        yield Case(
            name=f"argmax of {vocab_size} logits, {counted(rows, 'row')}",
            make=partial(_one, (rows, vocab_size), torch.float32, device),
            run=argmax,
            expected=lambda logits: logits.argmax(-1).float() + 1,  # a relative error of index 0 is undefined
            tolerance=0.0,
            result=lambda raw, _: raw.float() + 1,
        )


def _one(shape: tuple[int, int], dtype: torch.dtype, device: torch.device, seed: int) -> tuple[Tensor]:
    return (normal(shape, device, seed, dtype),)


def _quantised_sum(pair: tuple[Tensor, Tensor], form: Form) -> tuple[Tensor, Tensor]:
    return _rounded(pair[0], form), pair[1].float()


def _rounded(x: Tensor, form: Form) -> Tensor:
    """x rounded to the given form, in float32; 16-bit integers are exact within the tolerance of these cases."""
    match form:
        case Int8PerToken():
            scale, dtype = scale_for(x.abs().amax(-1, keepdim=True), torch.int8), torch.int8
        case E4m3PerToken():
            scale, dtype = token_scale(x), torch.float8_e4m3fn
        case StaticScale(dtype, scale):
            pass
        case _:
            return x.float()
    return quantise(x, scale, dtype).float() * scale


def _dequantised(x: Operand, *_) -> Tensor:
    """The output of a kernel that ends in store_row, in float32."""
    values = x.values.float()
    if isinstance(x.form, Int16):
        high, low = values.unflatten(0, (-1, 2)).unbind(1)
        values = 256 * high + low
    return values if x.scale is None else values * x.scale.view(-1, 1)
