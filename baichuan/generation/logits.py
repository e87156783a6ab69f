"""An executor's logits as generation wants them: rounded as the engine was built, and numbers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from baichuan.config import BuildConfig
from baichuan.errors import EngineError
from baichuan.executors.base import PagedExecutor, RowExecutor
from baichuan.records import Step


@dataclass
class Logits:
    """Calls the executor.  On a GPU only the first that are numbers are looked at: each look waits for it."""

    executor: RowExecutor | PagedExecutor
    build: BuildConfig
    seen: bool = False  # logits that are numbers

    def __call__(self, step: Step) -> Tensor:
        """[outputs, vocab_size] float32.  Raises EngineError where one is a NaN or an infinity: the weights hold one,
        or activations overflow the data type."""
        logits = self.executor.forward(step)
        if (not self.seen or logits.device.type == "cpu") and len(logits):
            if not bool(logits.isfinite().all()):
                raise EngineError(
                    "the engine's logits hold a NaN or an infinity, so that its text would mean nothing; build it "
                    "again from a whole checkpoint, or with --dtype bfloat16 or float32"
                )
            self.seen = True
        return logits.half().float() if self.build.logits_dtype == "float16" else logits
