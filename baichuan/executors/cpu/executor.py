"""The CPU executor, the default where there is no GPU."""

from __future__ import annotations

from baichuan.executors.cpu.library import library
from baichuan.executors.cpu.memory import keep_freed_memory
from baichuan.executors.cpu.native import Kernels
from baichuan.executors.cpu.ops import CpuOps
from baichuan.executors.cpu.reference import ReferenceExecutor, ReferenceOps


class CpuExecutor(ReferenceExecutor):
    """The reference executor with C kernels; without them where they cannot be compiled."""

    def make_ops(self, capacity: int) -> ReferenceOps:
        compiled = library()
        if compiled is None:
            return super().make_ops(capacity)
        keep_freed_memory()
        return CpuOps(self.spec, self.comm, capacity, Kernels(compiled))
