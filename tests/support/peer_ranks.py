"""Run by test_peers.py: ranks as processes that share memory, each with Triton's interpreter in the place of its GPU.

    peer_ranks.py STEPS [wait|empty]    the control: kernels do not wait, or do not empty what they read

Each step is a chain of messages of every kind, with random delays; every number depends on the step.  Prints how many
of the numbers were wrong on all ranks together.
"""

import os
import random
import sys
import time

os.environ["TRITON_INTERPRET"] = "1"

import peer_faults
import torch
import torch.multiprocessing as multiprocessing

from baichuan.executors.cuda.peer_memory import INBOXES, PeerMemory
from baichuan.kernels import exchange, sum_norm
from baichuan.kernels.gemv import gemv
from baichuan.kernels.operand import PLAIN

RANKS, WIDTH, ROWS, SLOT_BYTES = 3, 40, 3, 1024


def numbers(rank: int, step: int, message: int, rows: int) -> torch.Tensor:
    """Integers that float16 holds exactly, and their sums."""
    first = (7 * step + 31 * message + 101 * rank) % 256
    return (torch.arange(rows * WIDTH).view(rows, WIDTH) % 64 + first).half()


def run_rank(rank: int, memory: torch.Tensor, wrong: torch.Tensor, steps: int, fault: str) -> None:
    if fault:
        peer_faults.install(fault)
    sum_norm.TWO_SHOT_ROWS = RANKS  # one row in one shot, ROWS in two
    mine = PeerMemory(memory[rank], [each.data_ptr() for each in memory], rank)
    delays, ones = random.Random(rank), torch.ones(WIDTH).half()
    for step in range(steps):
        for message, rows in enumerate((1, ROWS, 1, ROWS)):
            time.sleep(delays.choice((0, 0, 0.001, 0.01)))
            x, residual = numbers(rank, step, message, rows), torch.zeros(rows, WIDTH).half()
            _, total = sum_norm.sum_norm(x, residual, ones, 1e-6, PLAIN, mine.slots(x.nbytes))
            wrong[rank] += (total != sum(numbers(each, step, message, rows) for each in range(RANKS))).sum()
        for message in (5, 6):  # which a product of one token sends itself
            y, slots = numbers(rank, step, message, 1), mine.slots(2 * WIDTH)
            part = gemv(torch.eye(16)[:1].half(), torch.nn.functional.pad(y.T, (0, 15)), torch.float16, slots=slots)
            _, total = sum_norm.sum_norm(part, residual[:1], ones, 1e-6, PLAIN, slots, sent=True)
            wrong[rank] += (total != sum(numbers(each, step, message, 1) for each in range(RANKS))).sum()
        x = numbers(rank, step, 4, ROWS)
        quantised = exchange.quantise_over_ranks(x, torch.ones(WIDTH), mine.slots(4 * ROWS))
        largest = torch.stack([numbers(each, step, 4, ROWS) for each in range(RANKS)]).float().amax((0, 2))
        wrong[rank] += (quantised.scaled[1] != largest / 127).sum()
        gathered = exchange.all_gather(x, mine.slots(x.nbytes, ends_step=True))
        wrong[rank] += (gathered != torch.cat([numbers(each, step, 4, ROWS) for each in range(RANKS)], -1)).sum()
        mine.end_step()


def main(steps: int, fault: str) -> int:
    torch.set_num_threads(1)
    memory = torch.full((RANKS, INBOXES * RANKS * SLOT_BYTES), 255, dtype=torch.uint8).share_memory_()
    wrong = torch.zeros(RANKS, dtype=torch.int64).share_memory_()
    multiprocessing.start_processes(run_rank, (memory, wrong, steps, fault), RANKS, start_method="fork")
    print(int(wrong.sum()))
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else ""))
