"""Work that is begun while PyTorch is imported; what needs PyTorch itself comes after the rest."""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from baichuan.parallel.launcher import Launch
from baichuan.util import manifest, nvidia
from baichuan.util.digest_process import ProcessDescriber

LIBRARIES = ("numpy", "safetensors", "sentencepiece")  # none of them imports PyTorch, nor does Triton
KERNELS = "baichuan.executors.cuda.executor"
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
        describer = manifest.Describer if "torch" in sys.modules else ProcessDescriber  # is an import to come?
        self.digests = {path: describer(path) for path in paths}
        gpu = launched.local_rank if paths and device != "cpu" and GPU_CONTROL.exists() else None
        self._threads = [threading.Thread(target=_prepare, args=(gpu,), daemon=True)]
        if gpu is not None:
            self._threads.append(threading.Thread(target=_start_gpu, args=(gpu,), daemon=True))

    def __enter__(self) -> Ahead:
        for describer in self.digests.values():
            describer.begin()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_) -> None:
        for describer in self.digests.values():
            describer.close()
        for thread in self._threads:
            thread.join()


def _import(modules: Iterable[str]) -> None:
    """What fails here fails again where it is needed, which says why."""
    for name in modules:
        with suppress(Exception):
            importlib.import_module(name)


def _prepare(gpu: int | None) -> None:
    """gpu: the index of the one that will run, if one will"""
    _import(LIBRARIES)
    if gpu is None:
        return
    with suppress(Exception):
        from triton.runtime.cache import triton_key

        triton_key()  # a digest of Triton's files, which the first kernel would wait for
    with suppress(Exception):
        import torch  # waits for the main thread, which imports it

        if gpu < torch.cuda.device_count():
            torch.zeros(1, device=f"cuda:{gpu}")
            importlib.import_module(KERNELS)


def _start_gpu(index: int) -> None:
    with suppress(OSError):
        nvidia.start_gpu(index)
