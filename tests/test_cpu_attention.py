"""The CPU's attention over prompts, chunks and single tokens against float64."""

from __future__ import annotations

import shutil

import pytest
import torch
from op_cases import normal
from scattered import row_of, scattered

from baichuan.executors.cpu.library import library
from baichuan.executors.cpu.native import Kernels
from baichuan.executors.cpu.ops import CpuOps
from baichuan.model.position import alibi_slopes, rotate
from baichuan.parallel.comm import Solo
from baichuan.records import AttentionSpec, Step

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")

CAPACITY = 120
STEPS = ([70, 1, 9, 33], [8, 2, 0, 1], [1, 40, 32, 9])  # new tokens of each sequence: panels, parts of them, and few
SPECS = [AttentionSpec(2, 1, 3, dim, rotary) for rotary in (True, False) for dim in (128, 64, 20)]


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.float8_e4m3fn])
def test_attention_is_float64_s(spec, dtype):
    compiled = library()
    assert compiled is not None
    scale = torch.tensor([0.04]) if dtype.itemsize == 1 else None
    cache = scattered(len(STEPS[0]), CAPACITY, spec, dtype, scales=(scale, scale), fill=torch.nan)
    x_dtype = dtype if scale is None else torch.float32
    ops, past = CpuOps(spec, Solo(), CAPACITY, Kernels(compiled)), [0] * 4
    for seed, lengths in enumerate(STEPS):
        step = Step.of([[0] * n for n in lengths], past)
        qkv = normal(sum(lengths), 3 * spec.num_heads * spec.head_dim, seed=seed).to(x_dtype)
        q = qkv.unflatten(-1, (3, spec.num_heads, -1))[:, 0].clone()
        y = ops.attention(qkv, cache, spec, step)
        if spec.rotary:
            q = rotate(q, ops.cos[step.positions], ops.sin[step.positions]).to(x_dtype)
        expected = attended(q.double(), cache, spec, step)
        bound = 4e-6 + torch.finfo(x_dtype).eps  # float32's sums of 110 terms of about 1; then one rounding
        if spec.rotary and x_dtype != torch.float32:
            bound *= 2  # the rotated query may be the neighbour of PyTorch's
        assert (y - expected).abs().max() <= bound * max(1, expected.abs().max())
        past = [a + b for a, b in zip(past, lengths, strict=True)]
        later = attended(q.double(), cache, spec, step, shift=1)  # the bound notices one key too many
        assert (y - later)[later.isfinite()].abs().max() > 10 * bound


def attended(q, cache, spec, step, shift=0):
    """float64's attention over what the cache holds.  q: [num_tokens, heads, dim]; shift: keys seen too many"""
    scale = 1 if cache.k_scale is None else cache.k_scale.double()
    k, v = (
        torch.stack(each).double() * scale for each in zip(*(row_of(cache, row) for row in range(4)), strict=True)
    )  # each [rows, heads, capacity, dim]
    rows = torch.arange(step.batch_size).repeat_interleave(step.cu_seqlens.diff())
    results = []
    for token, (row, position) in enumerate(zip(rows.tolist(), step.positions.tolist(), strict=True)):
        seen = position + 1 + shift
        scores = torch.einsum("hd,hcd->hc", q[token], k[row, :, :seen]) / spec.head_dim**0.5
        if not spec.rotary:
            slopes = alibi_slopes(spec.total_heads)[spec.first_head :][: spec.num_heads].double()
            scores += slopes[:, None] * (torch.arange(seen) - position)
        results.append(torch.einsum("hc,hcd->hd", scores.softmax(-1), v[row, :, :seen]).flatten())
    return torch.stack(results)
