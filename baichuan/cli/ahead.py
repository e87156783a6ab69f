"""What takes time, begun while something else is waited for: beside PyTorch's import what does without PyTorch, and
imports for a later part of a command."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from baichuan.parallel.launcher import Launch
from baichuan.util.manifest import Describer

LIBRARIES = ("numpy", "safetensors", "sentencepiece")  # none of them imports PyTorch
ON_GPUS = ("triton",)
KERNELS = "baichuan.executors.cuda.executor"
FLOAT_MODEL = "baichuan.hf_model.modeling"  # imports transformers
GPU_CONTROL = Path("/dev/nvidiactl")  # there where NVIDIA's driver is


class Ahead:
    """A context, at whose end what is unfinished is given up.

    digests: of this rank's files of the engines, by path, being computed; where an engine has fewer ranks than the
    world, it is taken to be there several times.
    """

    def __init__(self, engine_folders: Iterable[str], launched: Launch, device: str = "auto"):
        """device: one of config.DEVICES"""
        paths: list[Path] = []
        with suppress(OSError, ValueError):  # no such folder; who reads the engine says what is wrong
            for folder in engine_folders:
                ranks = sorted(Path(folder).glob("*_rank*.engine"), key=lambda path: (len(path.name), path.name))
                own = ranks[launched.rank % len(ranks) :][:1] if ranks else []
                paths += [path for path in own if path.is_file()]
        self.digests = {path: Describer(path) for path in paths}
        gpu = launched.local_rank if paths and device != "cpu" and GPU_CONTROL.exists() else None
        self._preparing = threading.Thread(target=_prepare, args=(gpu,), daemon=True)

    def __enter__(self) -> Ahead:
        for describer in self.digests.values():
            describer.begin()
        self._preparing.start()
        return self

    def __exit__(self, *_) -> None:
        for describer in self.digests.values():
            describer.close()
        self._preparing.join()


@contextmanager
def imported_meanwhile(*modules: str) -> Iterator[None]:
    """While the block runs, the modules are imported; who needs one before waits for it."""
    importing = threading.Thread(target=_import, args=(modules,), daemon=True)
    importing.start()
    try:
        yield
    finally:
        importing.join()


def _import(modules: Iterable[str]) -> None:
    """What fails here fails again where it is needed, which says why."""
    for name in modules:
        with suppress(Exception):
            importlib.import_module(name)


def _prepare(gpu: int | None) -> None:
    """gpu: its index, to be started too"""
    _import(LIBRARIES if gpu is None else LIBRARIES + ON_GPUS)
    if gpu is not None:
        with suppress(Exception):
            _start_gpu(gpu)


def _start_gpu(index: int) -> None:
    import torch  # waits for the main thread, which imports it

    if index < torch.cuda.device_count():
        torch.zeros(1, device=f"cuda:{index}")
        importlib.import_module(KERNELS)
