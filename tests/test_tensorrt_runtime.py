"""The runtime's parts: limits, what it says of machines and plans that do not fit, NCCL's capsule."""

import ctypes
import hashlib
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")

import trt_cases as cases
from trt_standin import StandInEngine

from baichuan.config import EngineSpec, QuantConfig
from baichuan.errors import EngineError, UnsupportedError
from baichuan.executors.backend import RankToOpen
from baichuan.executors.registry import BACKENDS
from baichuan.executors.tensorrt import nccl, plan
from baichuan.executors.tensorrt.api import load
from baichuan.executors.tensorrt.contract import make_contract
from baichuan.parallel.comm import Solo, run_ranks
from baichuan.records import Step
from baichuan.util import manifest


def test_a_smaller_cache_after_a_reset_forgets():
    """What an earlier request left behind is not seen."""
    executor = cases.network("v1_13b").executor()
    prompt = Step.of([[7, 8, 9]])
    executor.reset(1, 10)
    expected = executor.forward(prompt).clone()
    executor.reset(3, 40)
    executor.forward(Step.of([[1] * 24, [2] * 24, [3] * 24]))
    executor.reset(1, 10)
    assert torch.equal(executor.forward(prompt), expected)


def test_a_refused_shape_is_an_error():
    executor = cases.network().executor()
    executor.plan.select_profile(1)
    with pytest.raises(UnsupportedError, match="outside of the profile"):
        executor.plan.bind_input("input_ids", torch.zeros(1, 2, dtype=torch.int32))


@pytest.mark.parametrize(
    "change, sentence",
    [
        (lambda c: replace(c, inputs=c.inputs[1:]), "does not have the tensor input_ids that config.json describes"),
        (lambda c: replace(c, profiles=c.profiles[:1]), "has 2 optimisation profiles and config.json describes 1"),
        (
            lambda c: replace(c, outputs=(*c.outputs[:-1], replace(c.outputs[-1], dtype="float16"))),
            "does not have the tensor logits",
        ),
    ],
)
def test_a_plan_of_another_config_is_one_sentence(tmp_path, change, sentence):
    built = cases.network()
    engine = StandInEngine(built.api, built.graph, built.contract)
    plan.check_interface(engine, built.contract, built.api, tmp_path)
    with pytest.raises(EngineError, match=sentence):
        plan.check_interface(engine, change(built.contract), built.api, tmp_path)


def contract(**changes):
    api = load("tensorrt_rtx")
    made = make_contract(cases.model("v1_7b"), QuantConfig(), cases.limits(), api.name, api.version)
    return replace(made, **changes)


def test_another_version_is_one_sentence(tmp_path):
    with pytest.raises(
        EngineError, match="was built by tensorrt_rtx 1.2.3 and .* is installed; build the engine again"
    ):
        plan.open_plan(tmp_path / "plan", contract(version="1.2.3"), Solo())


@pytest.mark.parametrize(
    "targets, gpu, capability, sentence",
    [
        ((), "NVIDIA H200", (9, 0), "does not support NVIDIA H200 of compute capability 9.0 but 7.5, 8.0"),
        (
            ("8.9",),
            "NVIDIA A100",
            (8, 0),
            "was built for compute capability 8.9 and NVIDIA A100 has 8.0; build it with",
        ),
    ],
)
def test_another_gpu_is_one_sentence(monkeypatch, tmp_path, targets, gpu, capability, sentence):
    fake_gpus(monkeypatch, 1, gpu, capability)
    with pytest.raises(UnsupportedError, match=sentence):
        plan.open_plan(tmp_path / "plan", contract(targets=targets), Solo())


def fake_gpus(monkeypatch, count, gpu, capability):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)


class FakeEngine:
    """ICudaEngine as open_plan uses it beside its interface: settings in, a context out."""

    def __init__(self, log):
        self.log = log

    def create_runtime_config(self):
        config = SimpleNamespace(set_runtime_cache=lambda cache: self.log.append("cache set"))
        config.create_runtime_cache = lambda: SimpleNamespace(
            deserialize=lambda data: self.log.append(data) or True, serialize=lambda: b"new kernels"
        )
        self.config = config
        return config

    def create_execution_context(self, config=None):
        self.log.append(config is not None)
        return SimpleNamespace(set_communicator=lambda capsule: True)


def opened(monkeypatch, tmp_path, made, engine):
    """open_plan on a machine that claims a GPU, over a runtime that gives `engine`."""
    claim_gpu(monkeypatch, tmp_path, engine)
    return plan.open_plan(tmp_path / "plan", made, Solo(), tmp_path / "cache" / "digest.kernels")


def claim_gpu(monkeypatch, tmp_path, engine):
    fake_gpus(monkeypatch, 1, "NVIDIA L40", (8, 9))
    api = load("tensorrt_rtx")
    runtime = SimpleNamespace(deserialize_cuda_engine=lambda data: engine)
    trt = SimpleNamespace(
        Runtime=lambda log: runtime,
        CudaGraphStrategy=api.trt.CudaGraphStrategy,
        ComputeCapability=api.trt.ComputeCapability,
        DynamicShapesKernelSpecializationStrategy=api.trt.DynamicShapesKernelSpecializationStrategy,
    )
    monkeypatch.setattr(plan, "load", lambda name: replace(api, trt=trt))
    monkeypatch.setattr(plan, "check_interface", lambda *args: None)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    (tmp_path / "plan").write_bytes(b"plan")


def test_rtx_keeps_its_kernels_for_the_next_start(monkeypatch, tmp_path):
    log = []
    first = opened(monkeypatch, tmp_path, contract(), FakeEngine(log))
    assert log == ["cache set", True]
    del first  # as at the end of the process
    assert [path.read_bytes() for path in (tmp_path / "cache").iterdir()] == [b"new kernels"]
    opened(monkeypatch, tmp_path, contract(), FakeEngine(log))
    assert log[2:] == [b"new kernels", "cache set", True]


@pytest.mark.parametrize("gigabytes", [0.1, 14.04], ids=["one chunk", "v1_7b"])
def test_a_plan_of_any_size_keeps_its_kernels(monkeypatch, tmp_path, gigabytes):
    """By the backend's own way to a plan: a file has a digest for every 64 MiB, and a file's name 255 bytes at most."""
    claim_gpu(monkeypatch, tmp_path, FakeEngine([]))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    chunks = -(-int(gigabytes * 1e9) // manifest.CHUNK_BYTES)
    digests = [hashlib.sha256(bytes([number % 256])).hexdigest() for number in range(chunks)]
    spec = EngineSpec(cases.model("v1_7b"), QuantConfig(), cases.limits())
    job = RankToOpen(tmp_path / "plan", digests, spec, contract().to_json(), Solo())
    executor = BACKENDS["tensorrt_rtx"].open_rank(job)
    del executor  # as at the end of the process
    kept = list((tmp_path / "baichuan" / "tensorrt_rtx").iterdir())
    assert [path.read_bytes() for path in kept] == [b"new kernels"]
    assert kept[0].name == f"{manifest.one_digest(digests)}.kernels" and len(kept[0].name) < 255
    assert manifest.one_digest(digests) != manifest.one_digest([*digests[:-1], "0" * 64]), "other bytes, another file"


@pytest.mark.parametrize("mode, graphs", [("in_place", "WHOLE_GRAPH_CAPTURE"), ("growing", "DISABLED")])
def test_graphs_are_captured_where_addresses_stay(monkeypatch, tmp_path, mode, graphs):
    engine = FakeEngine([])
    opened(monkeypatch, tmp_path, contract(kv_mode=mode), engine)
    assert engine.config.cuda_graph_strategy.name == graphs


def test_a_plan_that_does_not_load_is_one_sentence(monkeypatch, tmp_path):
    with pytest.raises(EngineError, match="is not a plan that tensorrt_rtx .* can load; build the engine again"):
        opened(monkeypatch, tmp_path, contract(), None)


def test_too_few_gpus_are_one_sentence(monkeypatch):
    fake_gpus(monkeypatch, 1, "NVIDIA L40", (8, 9))
    with pytest.raises(UnsupportedError, match="2 ranks need a GPU each and this machine has 1"):
        plan.require_gpus(contract(), 2)
    plan.require_gpus(contract(), 1)


def test_a_communicator_is_a_capsule_of_nccl_s_handle(monkeypatch):
    """Over a stand-in for the library: one id, made by rank 0, joins every rank."""
    seen = []

    class Library:
        def ncclGetUniqueId(self, pointer):
            ctypes.memmove(pointer, b"id of rank 0".ljust(128, b"\1"), 128)
            return 0

        def ncclCommInitRank(self, pointer, count, unique, rank):
            seen.append((rank, count, bytes(unique)))
            pointer._obj.value = 4096 + rank
            return 0

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Library())
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    capsules = run_ranks(2, lambda comm: nccl.communicator_capsule(comm, torch.device("cuda", comm.rank)))
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    assert [get(capsule, b"ncclComm_t") for capsule in capsules] == [4096, 4097]
    assert sorted(rank for rank, _, _ in seen) == [0, 1] and {count for _, count, _ in seen} == {2}
    assert {unique for _, _, unique in seen} == {b"id of rank 0".ljust(128, b"\1")}


def test_a_missing_nccl_is_one_sentence(monkeypatch):
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(nccl, "LIBRARY", "libno-such-nccl.so")
    with pytest.raises(UnsupportedError, match="libno-such-nccl.so cannot be loaded"):
        nccl.communicator_capsule(SimpleNamespace(rank=0, world_size=2), torch.device("cpu"))


def test_every_call_exists_with_these_names():
    """What the runtime calls on TensorRT-RTX's classes, which are not made without a GPU."""
    trt = load("tensorrt_rtx").trt
    used = {
        trt.Runtime: ["deserialize_cuda_engine"],
        trt.ICudaEngine: [
            "num_io_tensors",
            "get_tensor_name",
            "get_tensor_shape",
            "get_tensor_mode",
            "get_tensor_dtype",
            "num_optimization_profiles",
            "create_execution_context",
            "create_runtime_config",
        ],
        trt.IExecutionContext: [
            "active_optimization_profile",
            "set_optimization_profile_async",
            "set_input_shape",
            "set_tensor_address",
            "execute_async_v3",
            "set_communicator",
        ],
        trt.IRuntimeConfig: [
            "cuda_graph_strategy",
            "dynamic_shapes_kernel_specialization_strategy",
            "create_runtime_cache",
            "set_runtime_cache",
        ],
        trt.IRuntimeCache: ["serialize", "deserialize"],
        trt.CudaGraphStrategy: ["WHOLE_GRAPH_CAPTURE", "DISABLED"],
        trt.DynamicShapesKernelSpecializationStrategy: ["NONE"],
        trt.TensorIOMode: ["INPUT"],
    }
    missing = [(owner.__name__, name) for owner, names in used.items() for name in names if not hasattr(owner, name)]
    assert not missing
