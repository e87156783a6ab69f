"""Run under mpirun by test_multi_gpu.py: the messages between the ranks' GPUs, eagerly and in replayed graphs.

    multi_gpu_program.py [REPLAYS]    every message's numbers, then REPLAYS replays with random delays
    multi_gpu_program.py REPLAYS wait|empty    the control: the kernels do not wait, or do not empty what they read
    multi_gpu_program.py REPLAYS die    rank 1 is killed while the others wait for its numbers

Prints what a message takes in a graph, and how many numbers of the replays were wrong.
"""

import os
import random
import signal
import sys
import time

import peer_faults
import torch

from baichuan.executors.cuda.comm import Nccl, slots_of
from baichuan.executors.device import gpu_of_rank
from baichuan.kernels import exchange, sum_norm
from baichuan.kernels.gemv import gemv
from baichuan.kernels.norm import add_rms_norm
from baichuan.kernels.operand import PLAIN
from baichuan.kernels.silu import silu_mul
from baichuan.parallel.comm import world_of_this_process
from baichuan.quant.smoothquant import quantise_input
from baichuan.records import SmoothQuantWeight

EPS = 1e-6
WIDTH = 5120


def main(replays: int, fault: str) -> int:
    if fault in ("wait", "empty"):
        peer_faults.install(fault)
    host = world_of_this_process()
    device = gpu_of_rank(host)
    comm = Nccl(host, device)
    print(f"peer memory {'mapped' if comm.peers else 'not mapped'}", flush=True)
    if not fault:
        check_sums(comm, device)
        check_other_messages(comm, device)
        time_messages(comm, device)
    wrong_numbers = replay(comm, device, replays, fault == "die")
    sys.stdout.write(f"{wrong_numbers} wrong numbers in {replays} replays on rank {comm.rank}\n")  # one write a line
    sys.stdout.flush()
    return 0


def drawn(rank: int, turn: int, shape, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(100 * rank + turn)).to(dtype)


def check_sums(comm: Nccl, device: torch.device) -> None:
    """Sums with the norm after them, by peer memory and for the largest by NCCL, against sums on the host."""
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        weight, slot_bytes = drawn(9, 0, WIDTH, dtype).to(device), comm.peers.slot_bytes if comm.peers else 0
        for rows in (1, 3, 40, 300):
            for turn in range(6):
                parts = [drawn(rank, turn, (rows, WIDTH), dtype) for rank in range(comm.world_size)]
                residual = drawn(8, turn, (rows, WIDTH), dtype).to(device)
                x = sum(part.float() for part in parts).to(dtype).to(device)
                expected, expected_total = add_rms_norm(x, residual, weight, EPS)
                slots = slots_of(comm, parts[0].nbytes)
                assert slots or not comm.peers or parts[0].nbytes > slot_bytes
                if slots:
                    own = parts[comm.rank].to(device)
                    result, total = sum_norm.sum_norm(own, residual, weight, EPS, PLAIN, slots)
                    assert torch.equal(total, expected_total) and torch.equal(result.values, expected.values)
                result = comm.all_reduce(parts[comm.rank].to(device))
                tolerance = 0 if comm.world_size == 2 else 4 * torch.finfo(dtype).eps
                assert torch.allclose(result.float(), x.float(), rtol=tolerance, atol=tolerance)


def check_other_messages(comm: Nccl, device: torch.device) -> None:
    for width in (3, 62848):
        x = torch.full((2, width), float(comm.rank), device=device)
        x[0, 0] = torch.nan
        gathered = comm.all_gather(x).cpu()
        ranks = torch.arange(comm.world_size).repeat_interleave(width).float().expand(2, -1).clone()
        ranks[0, ::width] = torch.nan
        assert torch.equal(gathered.nan_to_num(-1), ranks.nan_to_num(-1))
    largest = comm.all_reduce_max(torch.tensor([comm.rank, -comm.rank], device=device)).tolist()
    assert largest == [comm.world_size - 1, 0]
    for turn in range(6):
        x, smoother = drawn(comm.rank, turn, (5, 2560), torch.float16).to(device), torch.rand(2560, device=device) + 0.5
        weight = SmoothQuantWeight(smoother, smoother, None, smoother)  # only its smoother is read
        values, scale = quantise_input(x, weight, comm)
        slots = slots_of(comm, 4 * x.shape[0])
        if slots:
            result = exchange.quantise_over_ranks(x, smoother, slots)
            assert torch.equal(result.values, values) and torch.equal(result.scaled[1], scale.flatten())
            gate_up = drawn(comm.rank, turn, (5, 5120), torch.float16).to(device)
            apart = exchange.quantise_over_ranks(silu_mul(gate_up).values, smoother, slots_of(comm, 4 * x.shape[0]))
            both = exchange.quantise_over_ranks(gate_up, smoother, slots_of(comm, 4 * x.shape[0]), activates=True)
            assert torch.equal(both.values, apart.values) and torch.equal(both.scaled[1], apart.scaled[1])


def microseconds(run, count: int = 80) -> float:
    """The time of one of the `count` calls in a captured graph."""
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(count):
            run()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for turn in range(21):
        if turn == 1:
            start.record()
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 20 / count * 1000


def time_messages(comm: Nccl, device: torch.device) -> None:
    weight = drawn(9, 0, WIDTH, torch.float16).to(device)
    for rows in (1, 4, 16, 64, 256, 512):
        x, residual = (drawn(seed, rows, (rows, WIDTH), torch.float16).to(device) for seed in (comm.rank, 8))

        def own(x=x, residual=residual) -> None:
            sum_norm.sum_norm(x, residual, weight, EPS, PLAIN, slots_of(comm, x.nbytes))

        def nccl(x=x, residual=residual) -> None:
            add_rms_norm(comm.all_reduce(x), residual, weight, EPS)

        def norm_alone(x=x, residual=residual) -> None:
            add_rms_norm(x, residual, weight, EPS)

        ways = {"NCCL": nccl, "the norm alone": norm_alone}
        if comm.peers and x.nbytes <= comm.peers.slot_bytes:
            ways = {"peer memory": own, **ways}
        times = ", ".join(f"{name} {microseconds(way):.2f}" for name, way in ways.items())
        say(comm, f"sum, residual and norm of {rows} x {WIDTH} float16 in a graph, us: {times}")
    if not comm.peers:
        return
    logits = drawn(comm.rank, 0, (1, 62848), torch.float32).to(device)
    x, smoother = drawn(comm.rank, 0, (1, 6848), torch.float16).to(device), torch.rand(6848, device=device) + 0.5
    in_turn = iter([False, True] * 1000)  # a gather has an inbox of its own, which needs another message in between

    def gather() -> None:
        exchange.all_gather(logits, comm.peers.slots(logits.nbytes, ends_step=next(in_turn)))

    say(comm, f"gather of 251 KB: {microseconds(gather):.2f} us")
    largest = microseconds(lambda: exchange.quantise_over_ranks(x, smoother, slots_of(comm, 4)))
    say(comm, f"quantising by the largest of all ranks: {largest:.2f} us")


def say(comm: Nccl, line: str) -> None:
    if comm.rank == 0:
        print(line, flush=True)


def replay(comm: Nccl, device: torch.device, replays: int, die: bool) -> int:
    """How many numbers are not those of their replay, in a chain of messages whose ranks are late in turn."""
    turn = torch.zeros((), dtype=torch.int64, device=device)
    wrong = torch.zeros((), dtype=torch.int64, device=device)
    column, ones = torch.arange(WIDTH, device=device) % 64, torch.ones(WIDTH, dtype=torch.float16, device=device)
    zeros = torch.zeros(3, WIDTH, dtype=torch.float16, device=device)

    def numbers(rank: int, message: int) -> torch.Tensor:  # integers that float16 holds exactly, and their sums
        return (first(rank, message) + column).to(torch.float16).expand(3, -1)

    def first(rank: int, message: int) -> torch.Tensor:
        return (turn * 7 + message * 31 + rank * 101) % 256

    matrix = torch.zeros(WIDTH, 16, dtype=torch.float16, device=device)
    matrix[:, 0], matrix[:, 1] = column, ones

    def one_and_first(rank: int, message: int) -> torch.Tensor:
        """[1, 16], which makes numbers(rank, message) of the matrix."""
        x = torch.zeros(1, 16, dtype=torch.float16, device=device)
        x[:, 0] = ones[0]
        x[:, 1] = first(rank, message)
        return x

    def step() -> None:
        turn.add_(1)
        for message in range(4):
            slots = slots_of(comm, zeros.nbytes)
            _, total = sum_norm.sum_norm(numbers(comm.rank, message), zeros, ones, EPS, PLAIN, slots)
            expected = sum(numbers(rank, message) for rank in range(comm.world_size))
            wrong.add_((total != expected).sum())
        for message in (5, 6):  # which a product of one token sends itself
            slots = slots_of(comm, zeros[:1].nbytes)
            part = gemv(one_and_first(comm.rank, message), matrix, torch.float16, slots=slots)
            _, total = sum_norm.sum_norm(part, zeros[:1], ones, EPS, PLAIN, slots, sent=True)
            expected = sum(numbers(rank, message)[:1] for rank in range(comm.world_size))
            wrong.add_((total != expected).sum())
        gathered = comm.all_gather(numbers(comm.rank, 7))
        expected = torch.cat([numbers(rank, 7) for rank in range(comm.world_size)], -1)
        wrong.add_((gathered != expected).sum())
        comm.end_step()

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    delays = random.Random(comm.rank)
    for number in range(replays):
        if die and comm.rank == 1 and number == replays // 2:
            print(f"killed at {time.time()}", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        torch.cuda._sleep(delays.choice((0, 100, 10_000, 100_000)))  # cycles: up to 50 us
        graph.replay()
    torch.cuda.synchronize()
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 10_000, sys.argv[2] if len(sys.argv) > 2 else ""))
