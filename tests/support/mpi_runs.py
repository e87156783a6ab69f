"""Run under mpirun by test_mpirun.py: run.py several times in one world, `RANK N: exit code C` after the N-th.

Arguments: a JSON file with a list of run.py's arguments, and `raise` or `kill` to have rank 1 fail in its fifth step;
the file FAILED_AT then has the time of the monotonic clock.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import run
from baichuan.errors import EngineError
from baichuan.executors.cpu.reference import ReferenceExecutor
from baichuan.parallel.comm import world_of_this_process

FAILED_AT = "failed_at"


def main() -> int:
    rank = world_of_this_process().rank
    if len(sys.argv) > 2 and rank == 1:
        break_forward(sys.argv[2])
    worst = 0
    for number, given in enumerate(json.loads(Path(sys.argv[1]).read_text())):
        code = run.main(given)
        print(f"rank {rank} run {number}: exit code {code}\n", end="", flush=True)
        worst = max(worst, code)
    return worst


def break_forward(how: str) -> None:
    original, steps = ReferenceExecutor.forward, []

    def forward(self, step):
        steps.append(step)
        if len(steps) == 5:
            Path(FAILED_AT).write_text(str(time.monotonic()))
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise EngineError("the fifth step fails; try another")
        return original(self, step)

    ReferenceExecutor.forward = forward


if __name__ == "__main__":
    sys.exit(main())
