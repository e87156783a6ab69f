"""The reference executor's ops against float64."""

import op_cases
import pytest
import torch
from op_cases import CASES, SIMPLE_CASES, error

from baichuan.executors.cpu.reference import ReferenceOps
from baichuan.parallel.comm import Solo, run_ranks


def run(case):
    ops = ReferenceOps(case.spec, Solo(), op_cases.CAPACITY)
    with torch.inference_mode():
        return case.run(ops, lambda result: result, "cpu")


@pytest.mark.parametrize("case", [*SIMPLE_CASES, *CASES], ids=lambda case: case.name)
def test_op(case):
    assert error(*run(case)) <= case.tolerance


@pytest.mark.parametrize("name", ["attention ALiBi, cache in the dtype", "attention RoPE, cache in fp8"])
def test_the_tolerance_notices_the_wrong_head_or_key(name):
    result, expected = run(next(case for case in CASES if case.name == name))
    tolerance = next(case.tolerance for case in CASES if case.name == name)
    assert error(result.roll(16, 1), expected) > 3 * tolerance
    assert error(result.roll(1, 0), expected) > 3 * tolerance


@pytest.mark.parametrize("kind", op_cases.KINDS)
def test_the_tolerance_notices_a_wrong_channel(kind):
    result, expected = run(next(case for case in CASES if case.name == f"linear {kind}, 7 rows"))
    assert error(result.roll(1, 1), expected) > 3 * op_cases.KINDS[kind]


def test_collectives_of_threads():
    def body(comm):
        x = torch.full((2, 3), float(comm.rank + 1))
        objects = comm.gather_objects(comm.rank), comm.broadcast_object(f"rank {comm.rank}")
        return comm.all_reduce(x), comm.all_gather(x), comm.all_reduce_max(x), *objects

    for total, gathered, largest, ranks, sent in run_ranks(3, body):
        assert torch.equal(total, torch.full((2, 3), 6.0))
        assert gathered.tolist() == [[1.0] * 3 + [2.0] * 3 + [3.0] * 3] * 2
        assert torch.equal(largest, torch.full((2, 3), 3.0))
        assert ranks == [0, 1, 2] and sent == "rank 0"


def test_a_rank_that_fails_ends_the_others():
    def body(comm):
        if comm.rank == 1:
            raise ValueError("rank 1 fails")
        comm.gather_objects(None)

    with pytest.raises(ValueError, match="rank 1 fails"):
        run_ranks(2, body)
