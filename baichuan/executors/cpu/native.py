"""The C kernels called on tensors.  The formulas stand in native/*.c; results are new tensors."""

from __future__ import annotations

import ctypes
from ctypes import byref, c_float, c_int, c_int32, c_int64, c_void_p
from dataclasses import dataclass

import torch
from torch import Tensor

from baichuan.errors import UnsupportedError
from baichuan.records import LayerCache, Weight

TYPES = {  # must equal `enum type` in native/vector.h
    torch.float32: 0,
    torch.float16: 1,
    torch.bfloat16: 2,
    torch.float8_e4m3fn: 3,
    torch.int8: 4,
    torch.uint8: 5,  # two 4-bit integers
}
FEW_ROWS = 16  # must equal FEW_ROWS in native/products.c
GROUP_STEP = 32  # a group is a multiple of this, or the whole row


class _Matrix(ctypes.Structure):
    _fields_ = (
        ("data", c_void_p),
        ("scale", c_void_p),
        ("zero", c_void_p),
        ("input_scale", c_void_p),
        ("smoother", c_void_p),
        ("out", c_int64),
        ("in", c_int64),
        ("groups", c_int64),
        ("type", c_int32),
        ("scale_type", c_int32),
        ("w8a8", c_int32),
    )


class _Rows(ctypes.Structure):
    _fields_ = (("data", c_void_p), ("tokens", c_int64), ("type", c_int32))


class _Cache(ctypes.Structure):
    _fields_ = (
        ("k", c_void_p),
        ("v", c_void_p),
        ("tables", c_void_p),
        ("k_scale", c_void_p),
        ("v_scale", c_void_p),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("slopes", c_void_p),
        ("heads", c_int64),
        ("blocks_per_row", c_int64),
        ("dim", c_int64),
        ("block_bits", c_int32),
        ("type", c_int32),
    )


@dataclass(frozen=True)
class Matrix:
    """A weight as `struct matrix` of native/products.h; keeps the weight's memory alive."""

    weight: Weight
    struct: _Matrix

    @classmethod
    def of(
        cls,
        weight: Weight,
        data: Tensor,
        scale: Tensor | None = None,
        input_scale: Tensor | None = None,
        smoother: Tensor | None = None,
        w8a8: bool = False,
        zero: Tensor | None = None,
    ) -> Matrix | None:
        """None where the kernels do not support the group size or a dtype, or the memory is not contiguous."""
        out_features, in_features = weight.shape
        groups = scale.shape[1] if scale is not None and scale.dim() == 2 else 1
        tensors = [each for each in (data, scale, zero, input_scale, smoother) if each is not None]
        aligned = groups == 1 or in_features // groups % GROUP_STEP == 0
        if not aligned or not all(each.is_contiguous() and each.dtype in TYPES for each in tensors):
            return None
        pointers = map(_pointer, (data, scale, zero, input_scale, smoother))
        types = TYPES[data.dtype], 0 if scale is None else TYPES[scale.dtype]
        return cls(weight, _Matrix(*pointers, out_features, in_features, groups, *types, w8a8))


class Kernels:
    """The functions of the compiled library, run by as many threads as PyTorch uses."""

    def __init__(self, library: ctypes.CDLL):
        self._library = library
        library.add_rms_norm.restype = library.silu_mul.restype = None
        norm = (c_void_p, c_void_p, c_void_p, c_float)  # x, residual, weight, eps
        library.add_rms_norm.argtypes = (*norm, c_int64, c_void_p, c_void_p, c_int)
        library.norm_product.argtypes = (*norm, c_void_p, c_void_p, c_void_p, c_int)
        library.gated_mlp.argtypes = (*norm, c_void_p, c_void_p, c_void_p, c_void_p, c_int)

    def product(self, x: Tensor, matrix: Matrix, out_dtype: torch.dtype, scales: Tensor | None = None) -> Tensor:
        """x @ Wᵀ.  x: [num_tokens, in_features]; scales: [num_tokens, 1], SmoothQuant's if already known."""
        x = x.contiguous()
        y = torch.empty(x.shape[0], matrix.struct.out, dtype=out_dtype)
        done = self._library.product(
            byref(matrix.struct), byref(_rows(x)), _argument(scales), byref(_rows(y)), torch.get_num_threads()
        )
        return _checked(done, y)

    def add_rms_norm(self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """ops.Ops.add_rms_norm"""
        x, residual = x.contiguous(), _contiguous(residual)
        operands, total = self._norm_operands(x, residual, weight, eps)
        normed, threads = torch.empty_like(total), torch.get_num_threads()
        self._library.add_rms_norm(*operands, x.shape[1], normed.data_ptr(), total.data_ptr(), threads)
        return normed, total

    def norm_product(
        self, x: Tensor, residual: Tensor | None, norm: Tensor, matrix: Matrix, eps: float
    ) -> tuple[Tensor, Tensor]:
        """ops.Ops.norm_linear"""
        x, residual = x.contiguous(), _contiguous(residual)
        operands, total = self._norm_operands(x, residual, norm, eps)
        y = torch.empty(x.shape[0], matrix.struct.out, dtype=x.dtype)
        done = self._library.norm_product(
            *operands, total.data_ptr(), byref(matrix.struct), byref(_rows(y)), torch.get_num_threads()
        )
        return _checked(done, y), total

    def gated_mlp(
        self, x: Tensor, residual: Tensor | None, norm: Tensor, gate_up: Matrix, down_proj: Matrix, eps: float
    ) -> tuple[Tensor, Tensor]:
        """ops.Ops.gated_mlp"""
        x, residual = x.contiguous(), _contiguous(residual)
        operands, total = self._norm_operands(x, residual, norm, eps)
        y, threads = torch.empty(x.shape[0], down_proj.struct.out, dtype=x.dtype), torch.get_num_threads()
        weights = byref(gate_up.struct), byref(down_proj.struct)
        done = self._library.gated_mlp(*operands, total.data_ptr(), *weights, byref(_rows(y)), threads)
        return _checked(done, y), total

    def _norm_operands(self, x: Tensor, residual: Tensor | None, norm: Tensor, eps: float) -> tuple[tuple, Tensor]:
        """The first arguments of every norm, and the tensor for x + residual: x itself without a residual."""
        total = x if residual is None else torch.empty_like(x)
        return (byref(_rows(x)), _pointer(residual), norm.data_ptr(), eps), total

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """ops.Ops.silu_mul"""
        gate_up = gate_up.contiguous()
        width = gate_up.shape[1] // 2
        y = torch.empty(gate_up.shape[0], width, dtype=gate_up.dtype)
        self._library.silu_mul(byref(_rows(gate_up)), c_int64(width), _argument(y), torch.get_num_threads())
        return y

    def attend(
        self, cache: _Cache, qkv: Tensor, rows: Tensor, positions: Tensor, cu_seqlens: Tensor, longest: int
    ) -> Tensor:
        """Rotate q and k in qkv (RoPE), store k and v, then each token's attention over the keys up to its position.

        rows, positions: [num_tokens] int64, in the cache; cu_seqlens: [batch_size + 1] int32; longest: above every
        position
        """
        y = torch.empty(qkv.shape[0], qkv.shape[1] // 3, dtype=qkv.dtype)
        done = self._library.attend(
            byref(cache),
            byref(_rows(qkv)),
            _argument(rows),
            _argument(positions),
            _argument(cu_seqlens),
            c_int64(cu_seqlens.shape[0] - 1),
            c_int64(longest),
            _argument(y),
            torch.get_num_threads(),
        )
        return _checked(done, y)


def cache_struct(cache: LayerCache, cos: Tensor | None, sin: Tensor | None, slopes: Tensor | None) -> _Cache:
    """cos, sin: [positions, head_dim / 2] float32 with RoPE; slopes: [heads] float32 with ALiBi."""
    _, heads, size, dim = cache.k.shape
    pointers = map(_pointer, (cache.k, cache.v, cache.tables, cache.k_scale, cache.v_scale, cos, sin, slopes))
    return _Cache(*pointers, heads, cache.tables.shape[1], dim, size.bit_length() - 1, TYPES[cache.k.dtype])


def _rows(x: Tensor) -> _Rows:
    return _Rows(x.data_ptr(), x.shape[0], TYPES[x.dtype])


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _argument(x: Tensor | None) -> c_void_p:
    return c_void_p(_pointer(x))


def _checked(done: int, y: Tensor) -> Tensor:
    if not done:
        raise UnsupportedError("the activations do not fit into host memory; use a smaller batch or max_num_tokens")
    return y
