"""From an engine folder to something that generates."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from baichuan.engine.folder import Engine, check_world, read_engine, verify_rank_file
from baichuan.executors.base import Executor
from baichuan.executors.cpu.reference import ReferenceExecutor
from baichuan.executors.tensorrt.contract import Contract
from baichuan.executors.tensorrt.execute import open_tensorrt
from baichuan.generation.session import Session
from baichuan.parallel.comm import Communicator
from baichuan.weights.layout import assemble
from baichuan.weights.tensor_file import read_tensors

logger = logging.getLogger(__name__)


def open_session(
    folder: Path, comm: Communicator, model_version: str | None = None, keep_copies: bool = True
) -> Session:
    """The engine in `folder`, verified, on this rank's GPU or else on the CPU.

    keep_copies: whether spare GPU memory may hold dequantised copies of weights (executors/cuda/dense_copies.py).
    Raises EngineError for a damaged engine or another world than it was built for, on every rank alike.
    """
    engine = read_engine(folder)
    check_world(engine, comm, model_version)
    verify_rank_file(engine, comm)
    return Session(open_executor(engine, comm, keep_copies), engine.model, engine.build)


def open_executor(engine: Engine, comm: Communicator, keep_copies: bool = True) -> Executor:
    """The executor that the engine was built for, over this rank's file, which is taken as verified."""
    if engine.build.backend != "torch":
        path = engine.rank_file(comm.rank)
        return open_tensorrt(path, Contract.from_json(engine.contract), comm, engine.files[path.name]["sha256"])
    weights = assemble(read_tensors(engine.rank_file(comm.rank)), engine.model, engine.quant)
    if not torch.cuda.is_available():
        logger.info("running on the CPU with %d threads", torch.get_num_threads())
        return ReferenceExecutor(engine.model, engine.quant, weights, comm)
    from baichuan.executors.cuda.capability import require_numbers  # these import Triton, the CPU path does without it
    from baichuan.executors.cuda.comm import join_gpus
    from baichuan.executors.cuda.executor import CudaExecutor, Switches
    from baichuan.executors.cuda.load import load_on_gpu

    device, comm = join_gpus(comm)
    logger.info("running on %s", torch.cuda.get_device_name(device))
    require_numbers(engine.quant, engine.model.dtype, device)
    build = engine.build
    switches = Switches(build.gpt_attention_plugin, build.gemm_plugin, build.multi_block_mode, keep_copies)
    return CudaExecutor(engine.model, engine.quant, load_on_gpu(weights, device), comm, switches)
