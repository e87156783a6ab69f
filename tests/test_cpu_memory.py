"""What the process keeps between prompts: later ones need no new pages from the system."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")

PROGRAM = """
import resource
import torch
from baichuan.config import ModelConfig, QuantConfig
from baichuan.executors.cpu.executor import CpuExecutor
from baichuan.records import Step
from benchmarks.random_weights import RandomWeights

{before}
model = ModelConfig("v1_7b", 256, 4, 2, 1024, 64, dtype="float32")
executor = CpuExecutor(model, QuantConfig(), RandomWeights(model, QuantConfig(), "cpu").rank())
executor.reset(1, 1024)
torch.set_num_threads(1)
for _ in range(5):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    executor.forward(Step.of([[5] * 1024]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def new_pages(before: str = "") -> int:
    """Pages that the fifth prompt of a process gets from the system."""
    command = [sys.executable, "-c", PROGRAM.format(before=before)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def test_later_prompts_need_no_new_pages():
    assert new_pages() < 600
    forget = "import baichuan.executors.cpu.memory as m; m.LARGEST_BYTES = m.KEPT_BYTES = 1 << 17"
    assert new_pages(forget) > 2000  # the limit notices memory that is given back
