"""The backend `torch`: a safetensors file per rank, run by PyTorch on the CPU or by our kernels on a GPU."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from typing import Any

import torch

from baichuan.config import QuantConfig
from baichuan.executors.backend import RankToOpen, RankToWrite
from baichuan.executors.base import Executor
from baichuan.executors.cpu.executor import CpuExecutor
from baichuan.executors.device import resolve_device
from baichuan.weights.assemble import assemble
from baichuan.weights.tensor_file import read_tensors, write_tensors

logger = logging.getLogger(__name__)


class TorchBackend:
    """Implements executors.backend.Backend."""

    name, title = "torch", "PyTorch"
    packed = True
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
        spec, build, comm = job.spec, job.spec.build, job.comm
        on_cpu = resolve_device(job.device) == "cpu"
        if not on_cpu:
            threading.Thread(target=_start_gpu, args=(comm.local_rank,), daemon=True).start()
        weights = assemble(read_tensors(job.path), spec.model, spec.quant)
        if on_cpu:
            logger.info("running on the CPU with %d threads", torch.get_num_threads())
            return CpuExecutor(spec.model, spec.quant, weights, comm)
        from baichuan.executors.cuda.capability import require_numbers  # these import Triton, which CPUs do without
        from baichuan.executors.cuda.comm import join_gpus
        from baichuan.executors.cuda.executor import CudaExecutor, Switches
        from baichuan.executors.cuda.load import load_on_gpu

        device, comm = join_gpus(comm)
        logger.info("running on %s", torch.cuda.get_device_name(device))
        require_numbers(spec.quant, spec.model.dtype, device)
        switches = Switches(build.gpt_attention_plugin, build.gemm_plugin, build.multi_block_mode, job.keep_copies)
        return CudaExecutor(spec.model, spec.quant, load_on_gpu(weights, device), comm, switches)


def _start_gpu(index: int) -> None:
    """Initialise the GPU, in a thread of its own while modules are imported and the file is opened."""
    if index < torch.cuda.device_count():
        torch.zeros(1, device=f"cuda:{index}")
