"""Building an engine: predict, write every rank, describe, check, publish."""

from __future__ import annotations

import logging
import shutil
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import psutil
import torch

from baichuan.config import BuildConfig, ModelConfig, QuantConfig
from baichuan.engine.folder import Engine, publish, rank_file_name, staging, write_config
from baichuan.errors import UnsupportedError
from baichuan.executors.memory import full_kv_cache_bytes, require_host_memory
from baichuan.executors.tensorrt.build import BuildOptions, plan_memory, write_plan
from baichuan.util import manifest
from baichuan.util.processes import CONTEXT, run_tasks
from baichuan.util.progress import Progress
from baichuan.weights.plan import PlannedTensors
from baichuan.weights.tensor_file import planned_bytes, write_tensors

logger = logging.getLogger(__name__)

PROCESS_BYTES = 1 << 30  # one writing process: the interpreter, PyTorch and a few blocks of weights
DISK_SLACK_BYTES = 16 << 20  # config.json and the file system's own

PlanRank = Callable[[int], list[PlannedTensors]]  # picklable: with --parallel_build each process calls its own


@dataclass(frozen=True)
class BuildRequest:
    """An engine to be built.  plan_rank(rank) gives the tensors of one rank."""

    output_dir: Path
    model: ModelConfig
    quant: QuantConfig
    build: BuildConfig
    plan_rank: PlanRank
    parallel: bool = False
    tensorrt: BuildOptions = BuildOptions()  # of a TensorRT backend


def build_engine(request: BuildRequest, check: Callable[[Engine], None] | None = None) -> Engine:
    """Write an engine into request.output_dir, complete or not at all, and return it.

    check(engine) is called with the finished engine before it replaces an older one; it raises to refuse it.
    """
    sizes = [planned_bytes(request.plan_rank(rank)) for rank in range(request.build.world_size)]
    with staging(request.output_dir) as staged:
        _require_resources(request, sizes)
        paths = [staged / rank_file_name(request.model, request.build, rank) for rank in range(len(sizes))]
        contract = {}
        if request.build.backend == "torch":
            files = _write_ranks(request, paths, sum(sizes))
        else:
            contract = _build_plans(request, paths)
            files = {path.name: manifest.describe(path) for path in paths}
        engine = Engine(staged, request.model, request.quant, request.build, files, contract)
        write_config(engine)
        if check:
            check(engine)
        publish(staged, request.output_dir)
    return replace(engine, folder=request.output_dir)


def _require_resources(request: BuildRequest, sizes: Sequence[int]) -> None:
    """Say what the build and the engine take, and raise UnsupportedError where it is not there."""
    processes = len(sizes) if request.parallel else 1
    memory, disk = PROCESS_BYTES, sum(sizes)
    if request.build.backend != "torch":  # a plan is made in memory, of a rank's tensors on the disk
        memory = PROCESS_BYTES + plan_memory(max(sizes), request.quant)
        disk = sum(sizes) + processes * max(sizes)
    cache = full_kv_cache_bytes(request.model, request.quant, request.build)
    logger.info(
        "engine: %.2f GB on disk; building it takes up to %.1f GB of host memory; running it at full size takes "
        "%.2f GB of weights and %.2f GB of KV cache a rank",
        *(each / 1e9 for each in (sum(sizes), processes * memory, max(sizes), cache)),
    )
    require_host_memory(processes * memory, f"a build with {processes} process(es)")
    free = shutil.disk_usage(request.output_dir).free
    if disk + DISK_SLACK_BYTES > free:
        raise UnsupportedError(
            f"the build needs {disk / 1e9:.2f} GB on the disk of {request.output_dir} and "
            f"{free / 1e9:.2f} GB are free; free some, or choose another --output_dir"
        )
    if torch.cuda.is_available():
        total, holder = torch.cuda.mem_get_info()[1], "the GPU"
    else:
        total, holder = psutil.virtual_memory().total, "this machine"
    if max(sizes) + cache > total:
        message = (
            f"one rank needs {(max(sizes) + cache) / 1e9:.2f} GB when it runs at full size and {holder} has "
            f"{total / 1e9:.2f} GB; use more ranks, smaller limits or a quantisation"
        )
        if torch.cuda.is_available():
            raise UnsupportedError(message)
        logger.warning("%s, or run the engine elsewhere", message)


def _write_ranks(request: BuildRequest, paths: Sequence[Path], size: int) -> dict[str, dict]:
    """The files' entries in config.json, by name."""
    with Progress("writing the engine", size, "B") as progress:
        if request.parallel and len(paths) > 1:
            entries = _write_in_processes(request.plan_rank, paths, progress)
        else:
            entries = [_write_rank(request.plan_rank, *each, progress.advance) for each in enumerate(paths)]
    return {path.name: entries[rank] for rank, path in enumerate(paths)}


def _write_rank(plan_rank: PlanRank, rank: int, path: Path, advance: Callable[[int], None]) -> dict:
    """The file's entry in config.json."""
    with manifest.Describer(path) as describer:
        write_tensors(path, plan_rank(rank), advance, describer.wrote)
        return describer.entry()


def _build_plans(request: BuildRequest, paths: Sequence[Path]) -> dict:
    """One TensorRT plan a rank; their contract, which is the same for all."""
    tasks = {rank: partial(_build_rank_plan, request, rank, path) for rank, path in enumerate(paths)}
    contracts = dict(run_tasks(tasks, len(tasks) if request.parallel else 1, "leave --parallel_build out"))
    return contracts[0]


def _build_rank_plan(request: BuildRequest, rank: int, path: Path) -> dict:
    tensors = request.plan_rank(rank)
    return write_plan(path, tensors, request.model, request.quant, request.build, rank, request.tensorrt)


def _write_in_processes(plan_rank: PlanRank, paths: Sequence[Path], progress: Progress) -> dict[int, dict]:
    """_write_rank in one process a rank; the bytes that they have written meet in one counter."""
    counter, done = CONTEXT.Value("q", 0), threading.Event()

    def watch() -> None:
        while not done.wait(0.2):
            progress.advance(counter.get_obj().value - progress.done)  # its lock may have died with its holder

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    tasks = {rank: partial(_write_rank, plan_rank, rank, path, _count) for rank, path in enumerate(paths)}
    try:
        return dict(run_tasks(tasks, len(tasks), "leave --parallel_build out", partial(_remember_counter, counter)))
    finally:
        done.set()
        watcher.join()


_counter = None  # of a writing process, set once when it starts: a shared counter reaches a process in no other way


def _remember_counter(counter) -> None:
    global _counter
    _counter = counter


def _count(size: int) -> None:
    with _counter.get_lock():
        _counter.value += size
