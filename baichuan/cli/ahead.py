"""What takes time and does without PyTorch, begun while PyTorch is imported, which takes seconds."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from baichuan.util.manifest import Describer

LIBRARIES = ("numpy", "safetensors", "sentencepiece")  # none of them imports PyTorch
ON_GPUS = ("triton",)
GPU_CONTROL = Path("/dev/nvidiactl")  # there where NVIDIA's driver is


class Ahead:
    """A context, at whose end what is unfinished is given up.

    digests: of this rank's files of the engines, by path, being computed; where an engine has fewer ranks than the
    world, it is taken to be there several times.
    """

    def __init__(self, engine_folders: Iterable[str], rank: int):
        paths: list[Path] = []
        for folder in engine_folders:
            ranks = sorted(Path(folder).glob("*_rank*.engine"), key=lambda path: (len(path.name), path.name))
            paths += ranks[rank % len(ranks) :][:1] if ranks else []
        self.digests = {path: Describer(path) for path in paths if path.is_file()}
        libraries = [*LIBRARIES, *(ON_GPUS if paths and GPU_CONTROL.exists() else ())]
        self._importing = threading.Thread(target=_import, args=(libraries,), daemon=True)

    def __enter__(self) -> Ahead:
        for describer in self.digests.values():
            describer.begin()
        self._importing.start()
        return self

    def __exit__(self, *_) -> None:
        for describer in self.digests.values():
            describer.close()
        self._importing.join()


def _import(libraries: Iterable[str]) -> None:
    for name in libraries:
        with suppress(Exception):  # who needs it imports it again and says what is wrong
            importlib.import_module(name)
