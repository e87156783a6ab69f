"""The backends `tensorrt` and `tensorrt_rtx`: a TensorRT plan per rank.

Every command imports this module, so that what it stands for is imported only where it is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from baichuan.config import QuantConfig
from baichuan.errors import UnsupportedError
from baichuan.executors.backend import RankToOpen, RankToWrite
from baichuan.executors.base import Executor

if TYPE_CHECKING:
    from baichuan.executors.tensorrt.plan_writer import BuildOptions


class TensorRtBackend:
    """Implements executors.backend.Backend."""

    title = "TensorRT"
    packed = paged = keeps_copies = False
    flags: tuple[str, ...] = ("visualize", "enable_debug_output", "timing_cache", "compute_capability")

    def __init__(self, name: str):
        self.name = name  # also the Python module's name

    def require_installed(self) -> None:
        from baichuan.executors.tensorrt.api import load

        load(self.name)

    def build_options(self, given: Mapping[str, Any]) -> BuildOptions:
        from baichuan.executors.tensorrt.plan_writer import BuildOptions

        return BuildOptions(
            compute_capabilities=tuple(given["compute_capability"] or ()),
            timing_cache=Path(given["timing_cache"]) if given["timing_cache"] else None,
            visualize=given["visualize"],
            debug_output=given["enable_debug_output"],
        )

    def build_memory(self, rank_bytes: int, quant: QuantConfig) -> int:
        from baichuan.executors.tensorrt.plan_writer import plan_memory

        return plan_memory(rank_bytes, quant)

    def build_disk(self, rank_bytes: int) -> int:
        return rank_bytes  # the weights are stored beside the plan while it is built

    def write_rank(self, job: RankToWrite) -> dict:
        from baichuan.executors.tensorrt.plan_writer import write_plan

        return write_plan(job)

    def require_runnable(self, contract: Mapping, ranks: int) -> None:
        from baichuan.executors.tensorrt.contract import Contract
        from baichuan.executors.tensorrt.plan import require_gpus

        require_gpus(Contract.from_json(contract), ranks)

    def open_rank(self, job: RankToOpen) -> Executor:
        if job.settings.device == "cpu":
            raise UnsupportedError(
                "device cpu cannot run a TensorRT plan; leave --device out, or build with --backend torch"
            )
        from baichuan.executors.tensorrt.contract import Contract
        from baichuan.executors.tensorrt.execute import open_tensorrt

        return open_tensorrt(job.path, Contract.from_json(job.contract), job.comm, job.digests)
