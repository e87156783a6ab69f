"""A plan on a GPU: loaded, checked, bound and run."""

from __future__ import annotations

import logging
import mmap
import os
import tempfile
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from baichuan.errors import EngineError, UnsupportedError
from baichuan.executors.tensorrt.api import Api, load
from baichuan.executors.tensorrt.contract import IN_PLACE, Contract
from baichuan.executors.tensorrt.nccl import communicator_capsule
from baichuan.parallel.comm import Communicator

logger = logging.getLogger(__name__)

RTX_CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")  # TensorRT-RTX 1.7


@dataclass
class Plan:
    """A deserialised plan with one execution context on one stream."""

    api: Api
    context: Any  # IExecutionContext
    device: torch.device
    stream: torch.cuda.Stream | None  # None: the device is the CPU, where a test's stand-in runs
    held: tuple = ()  # what must live as long as the context

    def select_profile(self, index: int) -> None:
        if self.context.active_optimization_profile != index:
            done = self.context.set_optimization_profile_async(index, self._handle)
            self._check(done, f"profile {index}")

    def bind_input(self, name: str, tensor: Tensor) -> None:
        self._check(
            self.context.set_input_shape(name, tuple(tensor.shape)), f"the shape {tuple(tensor.shape)} of {name}"
        )
        self.bind_output(name, tensor)

    def bind_output(self, name: str, tensor: Tensor) -> None:
        self._check(self.context.set_tensor_address(name, tensor.data_ptr()), f"the address of {name}")

    def run(self) -> None:
        """Enqueue the bound tensors' run, after the work of PyTorch's current stream and before its next."""
        if self.stream is None:
            self._check(self.context.execute_async_v3(self._handle), "the run")
            return
        caller = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(caller)
        self._check(self.context.execute_async_v3(self._handle), "the run")
        caller.wait_stream(self.stream)

    @property
    def _handle(self) -> int:
        return self.stream.cuda_stream if self.stream else 0

    def _check(self, done: bool, what: str) -> None:
        if not done:
            self.api.log.raise_errors(what)
            raise EngineError(f"{self.api.name} refuses {what} and does not say why; build the engine again")


def open_plan(path: Path, contract: Contract, comm: Communicator, cache_path: Path | None = None) -> Plan:
    """The plan in `path` on this rank's GPU.

    cache_path: where TensorRT-RTX keeps the kernels that it compiled for this plan and GPU.
    Raises UnsupportedError without the library, without a GPU or with one that it does not support, EngineError for a
    plan of another TensorRT version or one that cannot be read.
    """
    api = load(contract.module)
    if api.version != contract.version:
        raise EngineError(
            f"{path} was built by {contract.module} {contract.version} and {api.version} is installed; "
            f"build the engine again, or install {contract.module} {contract.version}"
        )
    require_gpus(contract, comm.local_size)
    device = torch.device("cuda", comm.local_rank)
    torch.cuda.set_device(device)
    runtime = api.trt.Runtime(api.log)
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        engine = runtime.deserialize_cuda_engine(data)
    api.log.raise_errors(f"loading {path}")
    if engine is None:
        raise EngineError(f"{path} is not a plan that {api.name} {api.version} can load; build the engine again")
    check_interface(engine, contract, api, path)
    config, cache = _runtime_config(api, engine, contract, cache_path)
    context = engine.create_execution_context(config) if config else engine.create_execution_context()
    api.log.raise_errors("making an execution context")
    if context is None:
        raise UnsupportedError(f"{api.name} makes no execution context; the GPU's memory may be too small for the plan")
    capsule = None
    if comm.world_size > 1:
        capsule = communicator_capsule(comm, device)
        if not context.set_communicator(capsule):
            raise UnsupportedError(f"{api.name} {api.version} takes no NCCL communicator; build with --backend torch")
    plan = Plan(api, context, device, torch.cuda.Stream(device), (runtime, engine, config, capsule))
    if cache and cache_path:  # kernels are compiled while the plan runs, too
        weakref.finalize(plan, _save_cache, cache, cache_path)
    return plan


def check_interface(engine, contract: Contract, api: Api, path: Path) -> None:
    """Raise EngineError unless the plan's inputs and outputs are the contract's."""
    input_mode = api.trt.TensorIOMode.INPUT
    found = {}
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        dims = tuple(engine.get_tensor_shape(name))
        found[name] = (
            engine.get_tensor_mode(name) == input_mode,
            api.torch_dtypes[engine.get_tensor_dtype(name)],
            dims,
        )
    wanted = {
        spec.name: (is_input, spec.torch_dtype, tuple(-1 if isinstance(size, str) else size for size in spec.shape))
        for is_input, specs in ((True, contract.inputs), (False, contract.outputs))
        for spec in specs
    }
    if found != wanted:
        name = min(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
        raise EngineError(f"{path} does not have the tensor {name} that config.json describes; build the engine again")
    if engine.num_optimization_profiles != len(contract.profiles):
        raise EngineError(
            f"{path} has {engine.num_optimization_profiles} optimisation profiles and config.json describes "
            f"{len(contract.profiles)}; build the engine again"
        )


def require_gpus(contract: Contract, world_size: int) -> None:
    """Raise UnsupportedError unless this machine has a GPU for each rank that the plans were built for."""
    if not torch.cuda.is_available():
        raise UnsupportedError("a TensorRT plan runs on a GPU and PyTorch finds none; build with --backend torch")
    count = torch.cuda.device_count()
    if world_size > count:
        raise UnsupportedError(
            f"{world_size} ranks need a GPU each and this machine has {count}; build with a smaller --world_size"
        )
    if load(contract.module).rtx:  # TensorRT itself refuses another GPU's plan when it loads it
        for index in range(world_size):
            check_capability(contract, torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index))


def check_capability(contract: Contract, gpu: str, capability: tuple[int, int]) -> None:
    """Raise UnsupportedError unless TensorRT-RTX and the plan support the GPU of that name and compute capability."""
    here = "{}.{}".format(*capability)
    if here not in RTX_CAPABILITIES:
        raise UnsupportedError(
            f"TensorRT-RTX does not support {gpu} of compute capability {here} but {', '.join(RTX_CAPABILITIES)}; "
            "build with --backend torch or tensorrt"
        )
    if contract.targets and here not in contract.targets:
        raise UnsupportedError(
            f"the plan was built for compute capability {', '.join(contract.targets)} and {gpu} has {here}; "
            f"build it with --compute_capability {here}"
        )


def _runtime_config(api: Api, engine, contract: Contract, cache_path: Path | None):
    """TensorRT-RTX's IRuntimeConfig and IRuntimeCache; TensorRT has neither."""
    if not api.rtx:
        return None, None
    config, cache = engine.create_runtime_config(), None
    if contract.kv_mode == IN_PLACE:
        config.cuda_graph_strategy = api.trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
    else:  # every step has another shape and other addresses: neither graphs nor kernels would be used twice
        config.cuda_graph_strategy = api.trt.CudaGraphStrategy.DISABLED
        strategies = api.trt.DynamicShapesKernelSpecializationStrategy
        config.dynamic_shapes_kernel_specialization_strategy = strategies.NONE
    if cache_path:
        cache = config.create_runtime_cache()
        if cache_path.exists() and not cache.deserialize(cache_path.read_bytes()):
            logger.info("%s is of another GPU, driver or TensorRT-RTX; its kernels are compiled again", cache_path)
        config.set_runtime_cache(cache)
    return config, cache


def _save_cache(cache, path: Path) -> None:
    """Write a file that other ranks may be reading; failure only costs the next start some time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(memoryview(cache.serialize()))
        os.replace(file.name, path)
    except OSError as error:
        logger.info("%s cannot be written (%s); kernels are compiled again at the next start", path, error.strerror)
