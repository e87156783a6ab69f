"""What a backend is: how the ranks of an engine are written to files, and how these are run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from baichuan.config import EngineSpec, QuantConfig
from baichuan.executors.base import Executor
from baichuan.parallel.comm import Communicator
from baichuan.weights.rank_tensors import TensorBlocks


@dataclass(frozen=True)
class RankToWrite:
    """One rank's file, still to be written."""

    path: Path
    rank: int
    tensors: list[TensorBlocks]
    spec: EngineSpec
    options: Any  # what the backend's build_options gave; None: its defaults
    advance: Callable[[int], None]  # is told how many more bytes of weights are done
    wrote: Callable[[int, int], None]  # may be told the place and size of what the file holds from then on


@dataclass(frozen=True)
class RankToOpen:
    """One rank's file, verified."""

    path: Path
    digests: list[str]  # as config.json has them
    spec: EngineSpec
    contract: Mapping  # what write_rank gave
    comm: Communicator
    device: str  # one of device.DEVICES
    keep_copies: bool  # spare GPU memory may hold dequantised copies of weights (executors/cuda/dense_copies.py)


class Backend(Protocol):
    name: str
    title: str  # in messages
    packed: bool  # steps are packed tokens without padding; else padded batches
    flags: tuple[str, ...]  # of build.py: those that only some backends have

    def require_installed(self) -> None:
        """Raise UnsupportedError where a library is missing."""

    def build_options(self, given: Mapping[str, Any]) -> Any:
        """What write_rank takes as options.  given: a value for each of `flags`."""

    def build_memory(self, rank_bytes: int, quant: QuantConfig) -> int:
        """Host memory in bytes that writing a rank takes beyond a process that copies; rank_bytes: of its weights."""

    def build_disk(self, rank_bytes: int) -> int:
        """Disk space in bytes that writing a rank takes for a while, beside the rank's file."""

    def write_rank(self, job: RankToWrite) -> dict:
        """Write the file; what open_rank must know of it, as JSON values, the same for every rank."""

    def require_runnable(self, contract: Mapping, ranks: int) -> None:
        """Raise UnsupportedError where this machine cannot run all ranks at once."""

    def open_rank(self, job: RankToOpen) -> Executor:
        """The executor over the file."""
