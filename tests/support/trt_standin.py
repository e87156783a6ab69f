"""Stand-ins for ICudaEngine and IExecutionContext that interpret the network a plan was built from.

They see what TensorRT would see: names, shapes, profile numbers and addresses.  A tensor is made of the memory at its
address, so that a wrong binding shows as wrong numbers, and a shape outside the profile is refused as TensorRT does.
"""

from __future__ import annotations

import ctypes
import math
from pathlib import Path
from types import SimpleNamespace

import torch
from trt_interpreter import Interpreter

from baichuan.config import BuildConfig, ModelConfig, QuantConfig
from baichuan.executors.tensorrt import api as trt_api
from baichuan.executors.tensorrt.contract import Contract
from baichuan.executors.tensorrt.execute import TensorRtExecutor
from baichuan.executors.tensorrt.lowering import lower, weight_names
from baichuan.executors.tensorrt.network import Graph
from baichuan.executors.tensorrt.plan import Plan, check_interface
from baichuan.parallel.comm import Communicator, Solo
from baichuan.records import ModelWeights


class Network:
    """One rank's network, as a build defines it."""

    def __init__(
        self, config: ModelConfig, quant: QuantConfig, build: BuildConfig, weights: ModelWeights, rank: int = 0
    ):
        self.api = trt_api.load(build.backend)
        self.builder = self.api.trt.Builder(self.api.log)
        self.graph = Graph(self.api, self.builder.create_network(self.api.network_flags), weight_names(weights))
        self.contract, self.ops = lower(self.graph, config, quant, build, weights, rank)

    def executor(self, comm: Communicator | None = None) -> TensorRtExecutor:
        """The runtime over stand-ins."""
        return standin_executor(self.api, self.graph, self.contract, comm or Solo())


def standin_executor(api, graph: Graph, contract: Contract, comm: Communicator) -> TensorRtExecutor:
    engine = StandInEngine(api, graph, contract)
    check_interface(engine, contract, api, Path("plan"))
    context = StandInContext(engine, comm)
    return TensorRtExecutor(Plan(api, context, torch.device("cpu"), None), contract)


class StandInEngine:
    """The part of ICudaEngine that the runtime uses."""

    def __init__(self, api, graph: Graph, contract: Contract):
        self.api, self.graph, self.contract = api, graph, contract
        network = graph.network
        inputs = [network.get_input(index) for index in range(network.num_inputs)]
        outputs = [network.get_output(index) for index in range(network.num_outputs)]
        self.inputs, self.outputs = ({each.name: each for each in group} for group in (inputs, outputs))
        self.num_io_tensors = len(inputs) + len(outputs)
        self.num_optimization_profiles = len(contract.profiles)

    def get_tensor_name(self, index):
        return [*self.inputs, *self.outputs][index]

    def get_tensor_mode(self, name):
        return self.api.trt.TensorIOMode.INPUT if name in self.inputs else self.api.trt.TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name):
        return (self.inputs | self.outputs)[name].dtype

    def get_tensor_shape(self, name):
        return (self.inputs | self.outputs)[name].shape


class StandInContext:
    """The part of IExecutionContext that the runtime uses."""

    def __init__(self, engine: StandInEngine, comm: Communicator):
        self.engine, self.api = engine, engine.api
        self.interpreter = Interpreter(engine.api, engine.graph.network, engine.graph.constants, comm)
        self.active_optimization_profile = 0
        self.shapes, self.addresses = {}, {}
        self.runs: list[SimpleNamespace] = []

    def set_optimization_profile_async(self, index, stream):
        self.active_optimization_profile = index
        self.shapes, self.addresses = {}, {}
        return 0 <= index < self.engine.num_optimization_profiles

    def set_input_shape(self, name, shape):
        spec = next(each for each in self.engine.contract.inputs if each.name == name)
        sizes = self.engine.contract.profiles[self.active_optimization_profile].sizes
        for size, want in zip(shape, spec.shape, strict=True):
            low, _, high = sizes[want] if isinstance(want, str) else (want, want, want)
            if not low <= size <= high:
                self.api.log.errors.append(f"{name}: {shape} is outside of the profile's {want} {low} to {high}")
                return False
        self.shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name, address):
        self.addresses[name] = address
        return address % 16 == 0 and name in self.engine.inputs | self.engine.outputs

    def execute_async_v3(self, stream):
        inputs = {name: self._memory(name, self.shapes[name]) for name in self.engine.inputs}
        results = self.interpreter.run(inputs)
        for name, result in results.items():
            aliased = name.replace("present_", "past_", 1) if self.engine.contract.kv_mode == "in_place" else None
            if aliased in inputs:  # as get_aliased_input_tensor says of a cache update's output
                assert self.addresses[name] == self.addresses[aliased], f"{name} must share the memory of {aliased}"
            else:
                self._memory(name, result.shape).copy_(result)
        profile = self.engine.contract.profiles[self.active_optimization_profile].name
        self.runs.append(SimpleNamespace(profile=profile, shapes=dict(self.shapes)))
        return True

    def _memory(self, name, shape):
        tensor = (self.engine.inputs | self.engine.outputs)[name]
        dtype = self.api.torch_dtypes[tensor.dtype]
        size = math.prod(shape) * dtype.itemsize
        assert size, f"{name} is empty"
        memory = (ctypes.c_uint8 * size).from_address(self.addresses[name])
        return torch.frombuffer(memory, dtype=dtype).view(tuple(shape))
