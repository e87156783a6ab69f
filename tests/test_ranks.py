"""Ranks as threads: the first cause is raised, and nobody waits for ever."""

import threading

import pytest
import torch

from baichuan.errors import ConfigError, UnsupportedError
from baichuan.parallel.comm import run_ranks


def test_every_rank_answers_in_order():
    assert run_ranks(3, lambda comm: comm.gather_objects(comm.rank * 10)) == [[0, 10, 20]] * 3


def test_the_first_cause_is_raised_and_not_the_waiting_that_it_ended():
    def fail(comm):
        if comm.rank == 1:
            raise ConfigError("x is wrong; make it right")
        return comm.all_reduce(torch.ones(1))

    with pytest.raises(ConfigError, match="x is wrong"):
        run_ranks(2, fail)


@pytest.mark.parametrize("waits_in", ["a collective", "something else"])
def test_ranks_that_hang_end_in_a_sentence(waits_in):
    """Rank 1 never comes; rank 0 waits for it in a collective, or for something that the barrier knows nothing of."""
    for_ever = threading.Event()

    def hang(comm):
        if comm.rank == 1 or waits_in != "a collective":
            for_ever.wait()
        comm.all_reduce(torch.ones(1))

    with pytest.raises(UnsupportedError, match=r"ranks, run as threads, were not done after 0.3 s"):
        run_ranks(2, hang, timeout_s=0.3)
    for_ever.set()
