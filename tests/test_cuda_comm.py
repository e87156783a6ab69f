"""What messages through peers' memory need of their callers, without a GPU: consecutive ones have different inboxes,
also from one replayed step to the next.  The messages themselves: test_peers.py, and test_multi_gpu.py on GPUs."""

import pytest
import torch

from baichuan.executors.cuda.peer_memory import INBOXES, PeerMemory

SLOT_BYTES = 64


@pytest.fixture
def memory():
    return PeerMemory(torch.zeros(INBOXES * 2 * SLOT_BYTES, dtype=torch.uint8), [4096, 8192], 0)


def inboxes_of_step(memory, sums, gather):
    used = [memory.slots(8).inbox.data_ptr() for _ in range(sums)]
    if gather:
        used.append(memory.slots(8, ends_step=True).inbox.data_ptr())
    memory.end_step()
    return used


@pytest.mark.parametrize("sums, gather", [(4, True), (5, True), (4, False)])
def test_consecutive_messages_use_different_inboxes_from_step_to_step(memory, sums, gather):
    one = inboxes_of_step(memory, sums, gather)
    assert inboxes_of_step(memory, sums, gather) == one, "a replayed graph keeps them"
    used = 3 * one
    assert all(this != other for this, other in zip(used, used[1:], strict=False))


def test_a_step_that_a_replay_could_not_follow_is_noticed(memory):
    with pytest.raises(AssertionError, match="odd number of messages"):
        inboxes_of_step(memory, 3, gather=False)


def test_a_message_that_does_not_fit_has_no_slots(memory):
    assert memory.slots(SLOT_BYTES).inbox.shape == (2, SLOT_BYTES)
    assert memory.slots(SLOT_BYTES + 1) is None


def test_slots_are_those_of_one_inbox_at_every_rank(memory):
    slots = memory.slots(8)
    assert slots.constants == {"RANK": 0, "WORLD_SIZE": 2, "SLOT_BYTES": SLOT_BYTES}
    assert slots.distances.tolist() == [0, 4096]
