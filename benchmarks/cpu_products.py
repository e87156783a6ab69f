"""One product [rows, in] @ [out, in]ᵀ of every type of weight: the C kernels beside PyTorch's own operators."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from baichuan.config import ModelConfig
from baichuan.executors.cpu.library import library
from baichuan.executors.cpu.native import Kernels
from baichuan.records import DenseWeight, Int4Weight, Int8Weight, Weight
from baichuan.weights.types import product_of
from benchmarks.random_weights import PRECISIONS, RandomWeights

OUT, IN, GROUP = 13824, 4096, 32  # a weight larger than the cache, except INT4's
ROWS = (1, 8, 512)


def products(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    compiled = library()
    if compiled is None:
        raise SystemExit("there are no kernels to compare without a C compiler; install gcc")
    kernels = Kernels(compiled)
    for name in ("float32", "float16", "bfloat16", "int8", "int4"):
        model = ModelConfig("v1_7b", IN, 1, 32, OUT, 32000, dtype=name if name.startswith(("f", "b")) else "float16")
        weight = RandomWeights(model, PRECISIONS.get(name, PRECISIONS["float16"]), "cpu").linear(OUT, IN, True)
        for rows in ROWS:
            x = torch.randn(rows, IN).to(getattr(torch, model.dtype))
            matrix = product_of(weight, "cpu")(weight).matrix
            sides: dict[str, Callable[[], Tensor]] = {
                "ours": partial(kernels.product, x, matrix, x.dtype),
                **rivals(weight, x),
            }
            best = dict.fromkeys(sides, float("inf"))
            for _ in range(5):
                for side, run in sides.items():
                    start = time.perf_counter()
                    run()
                    best[side] = min(best[side], time.perf_counter() - start)
            print(
                f"{name}, {rows} rows: " + ", ".join(f"{side} {1e3 * s:.2f} ms" for side, s in best.items()), flush=True
            )


def rivals(weight: Weight, x: Tensor) -> dict[str, Callable[[], Tensor]]:
    """PyTorch's operators for this weight, on activations in the dtype that each is fastest with."""
    bf16 = x.bfloat16()
    match weight:
        case DenseWeight(w):
            return {"F.linear": lambda: F.linear(x, w)}
        case Int8Weight(q, scale):
            scale = scale.bfloat16()
            found = {"_weight_int8pack_mm, bfloat16": lambda: torch._weight_int8pack_mm(bf16, q, scale)}
            if x.shape[0] > 16:
                x8 = torch.randint(-127, 128, x.shape, dtype=torch.int8)
                found["_int_mm, 8-bit activations"] = lambda: torch._int_mm(x8, q.t())
            return found
        case Int4Weight(_, scale):
            packed = torch._convert_weight_to_int4pack_for_cpu(torch.randint(0, 16, weight.shape, dtype=torch.int32), 1)
            zeros = torch.zeros(scale.shape[1], scale.shape[0], 2, dtype=torch.bfloat16)
            name = "_weight_int4pack_mm_for_cpu, bfloat16"
            return {name: lambda: torch._weight_int4pack_mm_for_cpu(bf16, packed, GROUP, zeros)}
    raise TypeError(type(weight).__name__)
