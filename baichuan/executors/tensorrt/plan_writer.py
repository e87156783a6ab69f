"""From weights to a plan on disk."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from baichuan.config import BuildConfig, ModelConfig, QuantConfig
from baichuan.errors import ConfigError, UnsupportedError
from baichuan.executors.backend import RankToWrite
from baichuan.executors.tensorrt.api import Api, load
from baichuan.executors.tensorrt.contract import Contract
from baichuan.executors.tensorrt.drawing import write_svg
from baichuan.executors.tensorrt.lowering import lower, weight_names
from baichuan.executors.tensorrt.network import Graph
from baichuan.records import ModelWeights
from baichuan.util.progress import Progress
from baichuan.weights.assemble import assemble
from baichuan.weights.tensor_file import read_tensors, write_tensors

logger = logging.getLogger(__name__)

FP8_TARGETS = ("8.9", "12.0", "12.1")  # the GPUs of TensorRT-RTX that multiply FP8


@dataclass(frozen=True)
class BuildOptions:
    """The options that only a TensorRT build has."""

    compute_capabilities: tuple[str, ...] = ()  # TensorRT-RTX: GPUs to build for; empty = all that can run the network
    timing_cache: Path | None = None  # TensorRT: kernel timings, read before and written after the build
    visualize: bool = False  # write the network as PLAN.svg
    debug_output: bool = False  # tell a debug listener each layer's residual

    def checked(self, api: Api, quant: QuantConfig) -> BuildOptions:
        """These options for this module and quantisation.  Raises ConfigError for an option they do not support."""
        targets = self.compute_capabilities
        if not api.rtx:
            if targets:
                raise ConfigError(
                    f"--compute_capability {' '.join(targets)} belongs to TensorRT-RTX; "
                    "TensorRT builds for this machine's GPU, leave it out or use --backend tensorrt_rtx"
                )
            return self
        if self.timing_cache:
            logger.info("--timing_cache changes nothing: TensorRT-RTX times its kernels on the GPU that runs them")
        if "fp8" in (quant.weights, quant.kv_cache):
            targets = targets or FP8_TARGETS
            if unable := sorted(set(targets) - set(FP8_TARGETS)):
                raise ConfigError(
                    f"compute capability {unable[0]} has no FP8; use {', '.join(FP8_TARGETS)}, or another quantisation"
                )
        if unknown := sorted(set(targets) - set(capabilities(api))):
            raise ConfigError(
                f"{api.name} {api.version} does not build for compute capability {unknown[0]}; "
                f"use {', '.join(capabilities(api))}"
            )
        return replace(self, compute_capabilities=targets, timing_cache=None)


def capabilities(api: Api) -> dict[str, str]:
    """The compute capabilities that TensorRT-RTX builds for, and its names for them: 8.9 -> SM89."""
    names = [name for name in api.trt.ComputeCapability.__members__ if name.startswith("SM")]
    return {f"{name[2:-1]}.{name[-1]}": name for name in names}


def build_plan(
    config: ModelConfig,
    quant: QuantConfig,
    build: BuildConfig,
    weights: ModelWeights,
    rank: int,
    output: Path,
    options: BuildOptions | None = None,
) -> dict:
    """Write rank `rank`'s plan to `output`, complete or not at all.  Returns its contract as JSON values.

    The plan is written while it is made; memory-mapped weights are read from their file when they are used.
    Raises UnsupportedError when TensorRT is missing, refuses the network, or logs an error.
    """
    api = load(build.backend)
    options = (options or BuildOptions()).checked(api, quant)
    if build.gpt_attention_plugin and config.dtype == "float32":
        logger.info("float32: TensorRT has no fused attention over prompts and decomposes it")
    for name, given in (("use_gemm_plugin", build.gemm_plugin), ("multi_block_mode", build.multi_block_mode)):
        if not given:
            logger.info("--%s off changes nothing: TensorRT chooses its kernels itself", name)
    builder = api.trt.Builder(api.log)
    graph = Graph(api, builder.create_network(api.network_flags), weight_names(weights))
    contract, ops = lower(graph, config, quant, build, weights, rank)
    contract = replace(contract, targets=options.compute_capabilities)
    if options.debug_output:
        contract = replace(contract, debug=_mark_debug(graph, ops.residuals))
    if options.visualize:
        write_svg(graph, output.with_suffix(".svg"))
    logger.info("rank %d: %d layers lowered", rank, graph.network.num_layers)
    settings = builder_config(api, builder, contract, options)
    try:
        with open(output, "wb") as file, Progress(f"building rank {rank}", 0, "step") as progress:
            settings.progress_monitor = monitor = _monitor(api, progress)  # noqa: F841  TensorRT does not keep it alive
            writer = _writer(api, file)
            done = builder.build_serialized_network_to_stream(graph.network, settings, writer)
            if writer.failure:  # TensorRT does not notice a failed write
                raise UnsupportedError(
                    f"{output} cannot be written ({writer.failure}); free disk space or choose another --output_dir"
                )
            os.fsync(file.fileno())
        _raise_errors(api, config, build)
        if not done:
            raise UnsupportedError(f"{api.name} {api.version} built no plan and does not say why; use --backend torch")
    except BaseException:
        output.unlink(missing_ok=True)
        raise
    if options.timing_cache:
        options.timing_cache.write_bytes(memoryview(settings.get_timing_cache().serialize()))
    return contract.to_json()


def builder_config(api: Api, builder, contract: Contract, options: BuildOptions):
    """The IBuilderConfig: the contract's profiles, true float32, the targets."""
    settings = builder.create_builder_config()
    settings.clear_flag(api.trt.BuilderFlag.TF32)
    for profile in contract.profiles:
        shapes = builder.create_optimization_profile()
        for spec in contract.inputs:
            bounds = [spec.dims({name: sizes[k] for name, sizes in profile.sizes.items()}) for k in range(3)]
            shapes.set_shape(spec.name, *bounds)
        if settings.add_optimization_profile(shapes) < 0:
            api.log.raise_errors(f"the {profile.name} profile")
            raise UnsupportedError(f"{api.name} {api.version} refuses the {profile.name} profile; use smaller limits")
    if options.compute_capabilities:
        settings.num_compute_capabilities = len(options.compute_capabilities)
        for index, target in enumerate(options.compute_capabilities):
            settings.set_compute_capability(getattr(api.trt.ComputeCapability, capabilities(api)[target]), index)
    if options.timing_cache:
        path = options.timing_cache
        cache = settings.create_timing_cache(path.read_bytes() if path.exists() else b"")
        settings.set_timing_cache(cache, ignore_mismatch=False)
    api.log.raise_errors("the build's settings")
    return settings


def _raise_errors(api: Api, config: ModelConfig, build: BuildConfig) -> None:
    if any("is_decomposable" in error for error in api.log.errors):
        api.log.errors.clear()
        raise UnsupportedError(
            f"{api.name} has no fused attention for {config.num_heads // build.world_size} heads of {config.head_dim} "
            f"dimensions per rank in {config.dtype}; build with --use_gpt_attention_plugin off to let it be decomposed"
        )
    api.log.raise_errors("the build")


def _mark_debug(graph: Graph, residuals: Sequence) -> tuple[str, ...]:
    """Name the residual before every norm, and mark it."""
    for index, tensor in enumerate(residuals):
        tensor.name = f"residual.{index}"
        graph.network.mark_debug(tensor)
        graph.check(tensor, f"debug output {tensor.name}")
    return tuple(tensor.name for tensor in residuals)


def _writer(api: Api, file):
    base: Any = api.trt.IStreamWriter

    class Writer(base):
        def __init__(self):
            base.__init__(self)
            self.failure: OSError | None = None

        def write(self, data):
            try:
                return 0 if self.failure else file.write(data)
            except OSError as error:  # must not be raised into TensorRT
                self.failure = error
                return 0

    return Writer()


def _monitor(api: Api, progress: Progress):
    base: Any = api.trt.IProgressMonitor

    class Monitor(base):
        """Counts the steps of the outermost phase."""

        def __init__(self):
            base.__init__(self)
            self.outermost = None

        def phase_start(self, name, parent, steps):
            if parent is None:
                self.outermost = name
                progress.total = progress.done + steps

        def step_complete(self, name, step):
            if name == self.outermost:
                progress.advance(1)
            return True

        def phase_finish(self, name):
            pass

    return Monitor()


def plan_memory(size: int, quant: QuantConfig) -> int:
    """Bytes of memory that TensorRT takes to build a plan of `size` bytes of weights: measured 1.05 and 1.95 times."""
    return size if quant.weights == "none" else 2 * size


def write_plan(job: RankToWrite) -> dict:
    """build_plan from tensors not yet read, which are written beside the plan and memory-mapped while it is built."""
    spec, file = job.spec, job.path.with_suffix(".weights")
    try:
        write_tensors(file, job.tensors, job.advance)
        weights = assemble(read_tensors(file), spec.model, spec.quant)
        return build_plan(spec.model, spec.quant, spec.build, weights, job.rank, job.path, job.options)
    finally:
        file.unlink(missing_ok=True)
