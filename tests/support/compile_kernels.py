"""Program of test_compile.py: every kernel that the CUDA executor launches, compiled.

    python compile_kernels.py CAPABILITY SHARED_MEMORY    such as 90 232448: of a GPU, without its point, and in bytes

The executor's ops run on the CPU with launches replaced by compilation, so that the kernels come with the very
constants and types that a GPU would see; what they would have computed stays unset.  Prints one line per kernel.
"""

from __future__ import annotations

import re
import sys
from dataclasses import replace

import torch
import triton
from launches import QUANTS
from triton.backends.compiler import GPUTarget

from baichuan.config import ModelConfig, QuantConfig
from baichuan.executors.cuda import linear as cuda_linear
from baichuan.executors.cuda.comm import Nccl
from baichuan.executors.cuda.ops import CudaOps, Switches
from baichuan.executors.cuda.peer_memory import INBOXES, PeerMemory
from baichuan.executors.memory import KV_DTYPES
from baichuan.kernels import gemm_parts
from baichuan.kernels.spec import TRITON_TYPES, KernelSpec, plain_values
from baichuan.kernels.tiles import FEW_ROWS, TILE_128, TILE_160, TILE_256
from baichuan.model.decoder import attention_spec, forward
from baichuan.parallel.comm import Solo
from baichuan.records import LayerCache, Step
from benchmarks.random_weights import RandomWeights

ROWS = (1, 3, 10, 20, 40, 100, 300)
CAPACITY = 32
SLOT_BYTES = 1 << 20


def compile_instead(capability: int):
    seen = set()

    def launch(self, grid, inputs, scalars, outputs, constants, num_warps=4, num_stages=3):
        types = tuple(tensor.dtype for tensor in (*inputs, *outputs))
        plain = plain_values(constants)
        ones = tuple(name for name, value in zip(self.scalars, scalars, strict=True) if value == 1)
        variant = (self.kernel.__name__, types, tuple(plain.items()), num_warps, num_stages, ones)
        if variant not in seen:
            seen.add(variant)
            compiled = self.compile(types, plain, num_warps, num_stages, capability, ones)
            _, waited, after = compiled.asm["ptx"].rpartition("ld.volatile")  # kernels.peers.receive
            if waited:
                assert after.index("bar.sync") < after.index("st.global"), "a warp may empty what another waits for"
            print(self.kernel.__name__, len(compiled.asm["cubin"]), compiled.metadata.shared, flush=True)

    return launch


class FirstOfRanks(Nccl):
    """The first of several ranks with peer memory, which no peer writes to."""

    def __init__(self, world_size: int):
        self.rank, self.world_size = 0, world_size
        slots = torch.zeros(INBOXES * world_size * SLOT_BYTES, dtype=torch.uint8)
        self.peers = PeerMemory(slots, [0] * world_size, 0)


def run(version: str, quant: QuantConfig, rows: int, dtype: str = "float16", ranks: int = 1) -> None:
    """A prefill and a decode step of one layer."""
    model = ModelConfig(version, 1024, 1, 8, 4096, 256, dtype=dtype)
    weights = RandomWeights(model, quant, "cpu").rank(ranks, 0)
    spec, comm = attention_spec(model, 0, ranks), FirstOfRanks(ranks) if ranks > 1 else Solo()
    ops = CudaOps(spec, comm, CAPACITY, torch.device("cpu"), Switches())
    cache_dtype = KV_DTYPES[quant.kv_cache] or getattr(torch, dtype)
    layer = weights.layers[0]
    scales = layer.k_scale, layer.v_scale
    cache = LayerCache.whole_rows(rows, CAPACITY, spec, cache_dtype, "cpu", scales, tokens_per_block=64)
    step = Step.of([[1, 2]] * rows, device="cpu")
    for each in (step, replace(step, singles=1), step.next(torch.zeros(rows, dtype=torch.int64))):
        forward(ops, model, weights, (cache,), spec, each)


def compile_gluon() -> None:
    """gemm_int8.py's kernel, whose launch is Triton's own: every tile, the other types of y, and an activation."""
    from triton.experimental.gluon._runtime import GluonASTSource

    from baichuan.kernels import gemm_int8 as file

    few = [tile for _, tiles, split_tile in FEW_ROWS for tile in (*tiles, split_tile)]
    cases = [(tile, torch.float16, False) for tile in (TILE_128, TILE_160, *dict.fromkeys((TILE_256, *few)))]
    cases += [(TILE_128, dtype, False) for dtype in (torch.bfloat16, torch.float32)]
    cases += [(TILE_256, dtype, True) for dtype in (torch.float16, torch.bfloat16)]
    for tile, dtype, gated in cases:
        blocks = [
            f"tensordesc<i8[{rows}, {tile.block_k}],{file.block_layout(rows, tile.block_k)!r}>"
            for rows in file.blocks_of(tile)
        ]
        values = {"SMOOTH": True, "ROW_SCALES": not gated, "OVERLAP": True} | file.constants(tile, dtype, gated)
        y_type = "i8" if gated else "i32" if tile.splits > 1 else TRITON_TYPES[dtype]
        types = [*blocks, *["*fp32"] * 4, *["i32"] * 3, f"*{y_type}", *["constexpr"] * len(values)]
        signature = dict(zip(file._gemm_int8.arg_names, types, strict=True))
        aligned = {(index,): [["tt.divisibility", 16]] for index in range(len(blocks), len(types) - len(values))}
        source = GluonASTSource(file._gemm_int8, signature, values, aligned)
        target = GPUTarget("cuda", 90, 32)
        compiled = triton.compile(source, target=target, options={"num_warps": tile.num_warps})
        ptx = compiled.asm["ptx"]
        loop = ptx[ptx.index("wgmma.mma_async") : ptx.rindex("wgmma.wait_group")]
        in_flight = 2 if tile.second else 1
        assert re.search(rf"wgmma\.wait_group\S*\s+{in_flight};", loop), "no product stays in flight"
        print("_gemm_int8", len(compiled.asm["cubin"]), compiled.metadata.shared, flush=True)


def main(capability: int, shared_memory: int) -> None:
    KernelSpec.launch = compile_instead(capability)
    gemm_parts.shared_memory = lambda device: shared_memory
    cuda_linear.product = lambda x, weight, dtype: torch.empty(x.shape[0], weight.shape[0], dtype=dtype)
    quants = {name: quant for name, quant in QUANTS.items() if quant.weights != "fp8" or capability >= 89}
    if capability < 89:  # such GPUs have no FP8
        quants = {name: replace(quant, kv_cache="none") for name, quant in quants.items()}
    for version in ("v1_7b", "v2_13b"):
        for quant in quants.values():
            for rows in ROWS:
                run(version, quant, rows)
    for rows in ROWS:
        run("v2_13b", quants["int4 in groups"], rows, "bfloat16")
    for rows, ranks in ((1, 2), (40, 4)):
        for name in ("float16", "int8", "int4", "smooth_quant per token", "fp8", "fp8 per token"):
            if name in quants:
                run("v2_13b", quants[name], rows, ranks=ranks)
    if capability == 90:
        compile_gluon()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
