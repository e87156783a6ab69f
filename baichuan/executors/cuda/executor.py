"""The CUDA executor: Triton kernels and cuBLAS, short steps captured as CUDA graphs."""

from __future__ import annotations

import torch
from torch import Tensor

from baichuan.config import ModelConfig, QuantConfig
from baichuan.executors.cuda.dense_copies import DenseCopies, bytes_of_copies
from baichuan.executors.cuda.graph import StepGraphs
from baichuan.executors.cuda.ops import CudaOps, Switches
from baichuan.executors.kv_cache import KVCache, PoolSettings
from baichuan.executors.memory import spare_device_memory
from baichuan.model.decoder import attention_spec, forward
from baichuan.parallel.comm import Communicator, Solo
from baichuan.records import ModelWeights, Step


class CudaExecutor:
    """executors.base.Executor on one GPU, where its weights lie.

    Caches and graphs outlive reset() as long as the next request fits into them.
    """

    paged = True
    ops: CudaOps  # these two from reset() on
    graphs: StepGraphs

    def __init__(
        self,
        config: ModelConfig,
        quant: QuantConfig,
        weights: ModelWeights,
        comm: Communicator | None = None,
        switches: Switches | None = None,
        pool: PoolSettings | None = None,
    ):
        self.config, self.quant, self.weights, self.comm = config, quant, weights, comm or Solo()
        self.switches, self.pool = switches or Switches(), pool
        self.device = weights.embedding.device
        self.spec = attention_spec(config, self.comm.rank, self.comm.world_size)
        self.captures = self.switches.own_attention and self.comm.capturable
        self.cache = KVCache()
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False  # sums are float32 (ops.py)
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False

    def reset(self, rows: int, capacity: int) -> None:
        if rows <= self.cache.rows and capacity <= self.cache.capacity:
            return self.cache.forget()
        if self.cache.layers:  # what is old makes room before memory is asked for
            self.cache = KVCache()
            del self.ops, self.graphs
        kept_free = bytes_of_copies(self.weights) if self.switches.keep_copies else 0
        self.cache = KVCache.allocate(
            self.weights, self.quant, self.spec, rows, capacity, self.comm, self.pool, kept_free
        )
        copies = DenseCopies(spare_device_memory(self.device) if self.switches.keep_copies else 0)
        self.ops = CudaOps(self.spec, self.comm, self.cache.capacity, self.device, self.switches, copies)
        self.graphs = StepGraphs()

    @torch.inference_mode()
    def forward(self, step: Step) -> Tensor:
        return self.graphs(self._run, step) if self.captures else self._run(step)

    def _run(self, step: Step) -> Tensor:
        logits = forward(self.ops, self.config, self.weights, self.cache.layers, self.spec, step)
        self.comm.end_step()
        return logits
