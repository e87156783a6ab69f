"""The backend `torch`: a safetensors file per rank, run by PyTorch on the CPU or by our kernels on a GPU."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from baichuan.config import QuantConfig
from baichuan.executors.backend import RankToOpen, RankToWrite
from baichuan.executors.base import Executor
from baichuan.executors.cpu.executor import CpuExecutor
from baichuan.executors.cuda.capability import require_numbers
from baichuan.executors.cuda.load import load_on_gpu
from baichuan.executors.device import gpu_of_rank, resolve_device
from baichuan.executors.kv_cache import PoolSettings
from baichuan.records import ModelWeights
from baichuan.weights.assemble import assemble
from baichuan.weights.engine_checks import require_finite, require_shapes
from baichuan.weights.tensor_file import read_tensors, write_tensors

logger = logging.getLogger(__name__)


class TorchBackend:
    """Implements executors.backend.Backend."""

    name, title = "torch", "PyTorch"
    packed = paged = keeps_copies = True
    flags: tuple[str, ...] = ()

    def require_installed(self) -> None:
        pass

    def build_options(self, given: Mapping[str, Any]) -> None:
        return None

    def build_memory(self, rank_bytes: int, quant: QuantConfig) -> int:
        return 0

    def build_disk(self, rank_bytes: int) -> int:
        return 0

    def write_rank(self, job: RankToWrite) -> dict:
        write_tensors(job.path, job.tensors, job.advance, job.wrote)
        return {}

    def require_runnable(self, contract: Mapping, ranks: int) -> None:
        pass

    def open_rank(self, job: RankToOpen) -> Executor:
        """On this rank's GPU or on the CPU."""
        if resolve_device(job.settings.device) == "cpu":
            logger.info("running on the CPU with %d threads", torch.get_num_threads())
            weights = _read(job)
            require_finite(weights, job.spec.model, job.spec.quant, job.comm.rank, job.comm.world_size)
            return CpuExecutor(job.spec.model, job.spec.quant, weights, job.comm, _pool(job))
        return _open_on_gpu(job)


def _pool(job: RankToOpen) -> PoolSettings:
    return PoolSettings(job.spec.build.tokens_per_block, job.settings.kv_cache_free_gpu_mem_fraction)


def _read(job: RankToOpen) -> ModelWeights:
    """The rank's weights, memory-mapped, each of its shape and type."""
    weights = assemble(read_tensors(job.path), job.spec.model, job.spec.quant)
    require_shapes(weights, job.spec.model, job.spec.quant, job.comm.rank, job.comm.world_size)
    return weights


def _open_on_gpu(job: RankToOpen) -> Executor:
    """The weights are copied to the GPU while modules are imported, ranks join and Triton sets itself up."""
    spec, build, device = job.spec, job.spec.build, gpu_of_rank(job.comm)
    require_numbers(spec.quant, spec.model.dtype, device)
    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(lambda: load_on_gpu(_read(job), device))
        from baichuan.executors.cuda.comm import join_gpus  # these import Triton, which CPUs do without
        from baichuan.executors.cuda.executor import CudaExecutor, Switches
        from baichuan.kernels.rows import gather_rows

        device, comm = join_gpus(job.comm)
        logger.info("running on %s", torch.cuda.get_device_name(device))
        first = torch.zeros(1, 16, device=device)
        gather_rows(first, torch.zeros(1, dtype=torch.int64, device=device))  # the first launch takes half a second
        weights = loading.result()
    switches = Switches(build.gpt_attention_plugin, build.gemm_plugin, build.multi_block_mode, job.settings.keep_copies)
    return CudaExecutor(spec.model, spec.quant, weights, comm, switches, _pool(job))
