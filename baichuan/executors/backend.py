"""What a backend is: how it writes an engine's ranks to files, and how it runs them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from baichuan.config import EngineSpec, QuantConfig
from baichuan.executors.base import Executor
from baichuan.executors.open_settings import OpenSettings
from baichuan.parallel.comm import Communicator
from baichuan.weights.rank_tensors import TensorBlocks


@dataclass(frozen=True)
class RankToWrite:
    """One rank's file, still to be written."""

    path: Path
    rank: int
    tensors: list[TensorBlocks]
    spec: EngineSpec
    options: Any  # the result of the backend's build_options; None: its defaults
    advance: Callable[[int], None]  # called with the number of bytes of weights just done
    wrote: Callable[[int, int], None]  # may be called with offset and size of each range once it is in the file


@dataclass(frozen=True)
class RankToOpen:
    """One rank's file, verified."""

    path: Path
    digests: list[str]  # as config.json has them
    spec: EngineSpec
    contract: Mapping  # the result of write_rank
    comm: Communicator
    settings: OpenSettings = OpenSettings()


class Backend(Protocol):
    name: str
    title: str  # as messages call it
    packed: bool  # steps are packed tokens without padding; else padded batches
    paged: bool  # its executors have a paged KV cache
    keeps_copies: bool  # its executors on GPUs heed OpenSettings.keep_copies
    flags: tuple[str, ...]  # flags of build.py that only some backends have

    def require_installed(self) -> None:
        """Raise UnsupportedError where a library is missing."""

    def build_options(self, given: Mapping[str, Any]) -> Any:
        """The `options` of write_rank.  given: a value for each of `flags`."""

    def build_memory(self, rank_bytes: int, quant: QuantConfig) -> int:
        """Host memory in bytes that writing a rank of rank_bytes weights takes beyond a process that copies them."""

    def build_disk(self, rank_bytes: int) -> int:
        """Disk space in bytes that writing a rank takes temporarily, beside the rank's file."""

    def write_rank(self, job: RankToWrite) -> dict:
        """Write the file.  Returns what open_rank needs to know of it, as JSON values, the same for every rank."""

    def require_runnable(self, contract: Mapping, ranks: int) -> None:
        """Raise UnsupportedError where this machine cannot run all ranks at once."""

    def open_rank(self, job: RankToOpen) -> Executor:
        """The executor over the file."""
