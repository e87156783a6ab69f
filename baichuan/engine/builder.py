"""Building an engine: predict, write every rank, describe, check, publish."""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch

from baichuan.config import BuildConfig, EngineSpec, ModelConfig, QuantConfig
from baichuan.engine.folder import Engine, publish, rank_file_name, staging, write_config
from baichuan.errors import UnsupportedError, counted
from baichuan.executors.backend import RankToWrite
from baichuan.executors.device import resolve_device
from baichuan.executors.memory import full_kv_cache_bytes, require_host_memory, sequence_kv_cache_bytes
from baichuan.executors.registry import BACKENDS
from baichuan.text.settings import copy_text_files
from baichuan.util import manifest
from baichuan.util.processes import CONTEXT, run_tasks
from baichuan.util.progress import Progress
from baichuan.util.publishing import synced_meanwhile
from baichuan.weights.rank_tensors import TensorBlocks, total_bytes

logger = logging.getLogger(__name__)

PROCESS_BYTES = 1 << 30  # one writing process: the interpreter, PyTorch and a few blocks of weights
DISK_SLACK_BYTES = 16 << 20  # for config.json and the file system's metadata

RankTensors = Callable[[int], list[TensorBlocks]]  # picklable: with --parallel_build each process calls its own


@dataclass(frozen=True)
class BuildRequest:
    """An engine to be built."""

    output_dir: Path
    model: ModelConfig
    quant: QuantConfig
    build: BuildConfig
    rank_tensors: RankTensors  # what a rank's file holds, not yet read
    parallel: bool = False
    options: Any = None  # the result of the backend's build_options
    text_folder: Path | None = None  # the engine gets its tokenizer and generation settings
    dummy: bool = False  # the weights are made up
    device: str = "auto"  # the engine must fit its memory; one of device.DEVICES


def build_engine(request: BuildRequest, check: Callable[[Engine], None] | None = None) -> Engine:
    """Write an engine into request.output_dir, complete or not at all, and return it.

    check(engine) is called with the finished engine before it replaces an older one; it raises to refuse it.
    """
    tensors = [request.rank_tensors(rank) for rank in range(request.build.world_size)]
    sizes = [total_bytes(each) for each in tensors]
    with staging(request.output_dir) as staged:
        _require_resources(request, sizes)
        paths = [staged / rank_file_name(request.model, request.build, rank) for rank in range(len(sizes))]
        start = time.perf_counter()
        with synced_meanwhile(staged, "*.engine"):
            files, contract = _write_ranks(request, paths, tensors, sum(sizes))
            logger.info("written in %.1f s", time.perf_counter() - start)
            texts = copy_text_files(request.text_folder, staged) if request.text_folder else []
            text_files = {path.name: manifest.describe(path) for path in texts}
            engine = Engine(
                staged, request.model, request.quant, request.build, files, contract, text_files, request.dummy
            )
            write_config(engine)
            if check:
                check(engine)
        publish(staged, request.output_dir)
    return replace(engine, folder=request.output_dir)


def _require_resources(request: BuildRequest, sizes: Sequence[int]) -> None:
    """Log the memory and disk that build and engine need; raise UnsupportedError where they are not available."""
    processes = len(sizes) if request.parallel else 1
    backend = BACKENDS[request.build.backend]
    memory = PROCESS_BYTES + backend.build_memory(max(sizes), request.quant)
    disk = sum(sizes) + processes * backend.build_disk(max(sizes))
    cache = full_kv_cache_bytes(request.model, request.quant, request.build)
    logger.info(
        "engine: %.2f GB on disk; building it takes up to %.1f GB of host memory; running it at full size takes "
        "%.2f GB of weights and %.2f GB of KV cache per rank",
        *(each / 1e9 for each in (sum(sizes), processes * memory, max(sizes), cache)),
    )
    require_host_memory(processes * memory, f"a build with {counted(processes, 'process')}")
    free = shutil.disk_usage(request.output_dir).free
    if disk + DISK_SLACK_BYTES > free:
        raise UnsupportedError(
            f"the build needs {disk / 1e9:.2f} GB on the disk of {request.output_dir} and "
            f"{free / 1e9:.2f} GB are free; free some, or choose another --output_dir"
        )
    on_gpu = resolve_device(request.device) == "cuda"
    if on_gpu:
        total, holder = torch.cuda.mem_get_info()[1], "the GPU"
    else:
        total, holder = psutil.virtual_memory().total, "this machine"
    least = sequence_kv_cache_bytes(request.model, request.quant, request.build) if backend.paged else cache
    if max(sizes) + least > total:
        load = "runs a single sequence" if backend.paged else "runs at full size"
        message = (
            f"one rank needs {(max(sizes) + least) / 1e9:.2f} GB when it {load} and {holder} has {total / 1e9:.2f} GB; "
            "use more ranks, smaller limits or a quantisation"
        )
        if on_gpu:
            raise UnsupportedError(message)
        logger.warning("%s, or run the engine elsewhere", message)
    elif max(sizes) + cache > total:
        logger.info("%s has %.2f GB: as many sequences run at once as fit, and the others wait", holder, total / 1e9)


def _write_ranks(
    request: BuildRequest, paths: Sequence[Path], tensors: Sequence[list[TensorBlocks]], size: int
) -> tuple[dict[str, dict], dict]:
    """The files' entries in config.json by name, and the contract, which is the same for all.

    size: bytes of all tensors.  Each process opens the source again, because open files cannot be pickled.
    """
    with Progress("writing the engine", size, "B") as progress:
        if request.parallel and len(paths) > 1:
            tasks = {rank: partial(_write_rank, request, rank, path) for rank, path in enumerate(paths)}
            written = _in_processes(tasks, progress)
        else:
            written = {
                rank: _write_rank(request, rank, path, each, progress.advance)
                for rank, (path, each) in enumerate(zip(paths, tensors, strict=True))
            }
    entries, contracts = zip(*(written[rank] for rank in range(len(paths))), strict=True)
    return {path.name: entry for path, entry in zip(paths, entries, strict=True)}, contracts[0]


def _write_rank(
    request: BuildRequest,
    rank: int,
    path: Path,
    tensors: list[TensorBlocks] | None = None,
    advance: Callable[[int], None] | None = None,
) -> tuple[dict, dict]:
    """The file's entry in config.json, and the contract.

    Called without tensors and advance in a process of its own, which opens the source again and counts by _count.
    """
    backend, spec = BACKENDS[request.build.backend], EngineSpec(request.model, request.quant, request.build)
    tensors = tensors or request.rank_tensors(rank)
    with manifest.Describer(path) as describer:
        job = RankToWrite(path, rank, tensors, spec, request.options, advance or _count, describer.wrote)
        contract = backend.write_rank(job)
        return describer.entry(), contract


def _in_processes(tasks: Mapping[int, Callable[[], Any]], progress: Progress) -> dict[int, Any]:
    """The tasks' results, each made in a process of its own; one shared counter adds up the bytes written."""
    counter, done = CONTEXT.Value("q", 0), threading.Event()

    def watch() -> None:
        while not done.wait(0.2):
            progress.advance(counter.get_obj().value - progress.done)  # its lock may have died with its holder

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        return dict(run_tasks(tasks, len(tasks), "leave --parallel_build out", partial(_remember_counter, counter)))
    finally:
        done.set()
        watcher.join()


_counter: Any = None  # set when a writing process starts: a shared counter reaches a process in no other way


def _remember_counter(counter) -> None:
    global _counter
    _counter = counter


def _count(size: int) -> None:
    with _counter.get_lock():
        _counter.value += size
