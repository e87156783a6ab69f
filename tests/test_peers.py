"""Messages between GPUs through memory that all ranks map: kernels/peers.py, sum_norm.py and exchange.py."""

import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from kernel_device import DEVICE, MARKS, to_device

from baichuan.kernels import sum_norm as module
from baichuan.kernels.exchange import all_gather, quantise_over_ranks
from baichuan.kernels.gemv import gemv
from baichuan.kernels.gemv_int import gemv_int
from baichuan.kernels.norm import add_rms_norm
from baichuan.kernels.operand import PLAIN, Int8PerToken, Int16
from baichuan.kernels.peers import Slots
from baichuan.kernels.rows import quantise_rows
from baichuan.kernels.silu import silu_mul
from baichuan.kernels.sum_norm import sum_norm
from baichuan.quant.weight_only import quantise_int4, quantise_int8

pytestmark = MARKS

PROGRAM = Path(__file__).with_name("support") / "peer_ranks.py"
ROWS, WIDTH, SLOT_BYTES = 4, 96, 4096


class Inboxes:
    """The inboxes of all ranks, as `rank` sees them."""

    def __init__(self, world_size: int, rank: int):
        self.memory = torch.full((world_size, world_size, SLOT_BYTES), 255, dtype=torch.uint8, device=DEVICE)
        addresses = torch.tensor([each.data_ptr() for each in self.memory], device=DEVICE)
        self.slots = Slots(rank, self.memory[rank], addresses - addresses[rank])

    def slot(self, receiver: int, sender: int, like: torch.Tensor) -> torch.Tensor:
        return self.memory[receiver, sender].view(like.dtype)[: like.numel()].view(like.shape)

    def arrive(self, parts: list[torch.Tensor]) -> None:
        """What this rank's peers send it, before it looks."""
        for peer, part in enumerate(parts):
            if peer != self.slots.rank:
                self.slot(self.slots.rank, peer, part).copy_(part)

    @property
    def is_empty(self) -> bool:
        """Whether this rank's own inbox is."""
        return bool((self.memory[self.slots.rank] == 255).all())


def drawn(world_size: int, dtype: torch.dtype = torch.float16) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(ROWS, WIDTH, generator=generator) for _ in range(world_size)]
    if dtype == torch.bfloat16:  # sums that need no rounding, which Triton's interpreter does by cutting off
        parts = [(8 * part).clamp(-32, 32).round() / 8 for part in parts]
    return [part.to(DEVICE, dtype) for part in parts]


@pytest.mark.parametrize("form", [PLAIN, Int16(), Int8PerToken()], ids=lambda form: type(form).__name__)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("world_size, rank", [(2, 0), (2, 1), (4, 2)])
def test_sum_and_norm_of_one_rank(world_size, rank, dtype, form):
    """The bits are those of a sum in rank order, rounded, and of the norm of one GPU."""
    *parts, residual = drawn(world_size + 1, dtype)
    weight, inboxes = residual[0].clone(), Inboxes(world_size, rank)
    inboxes.arrive(parts)
    normed, total = sum_norm(parts[rank], residual, weight, 1e-6, form, inboxes.slots)
    x = parts[0].float()
    for part in parts[1:]:
        x = x + part.float()
    expected, expected_total = add_rms_norm(x.to(dtype), residual, weight, 1e-6, form)
    assert torch.equal(total, expected_total) and torch.equal(normed.values, expected.values)
    assert not torch.equal(total, add_rms_norm(parts[rank], residual, weight, 1e-6, form)[1]), "the control: no sum"
    assert inboxes.is_empty
    for peer in range(world_size):
        if peer != rank:
            assert torch.equal(inboxes.slot(peer, rank, parts[rank]), parts[rank])


def test_two_shots_send_a_row_to_its_owner_and_the_sum_to_all(monkeypatch):
    monkeypatch.setattr(module, "TWO_SHOT_ROWS", 4)
    world_size, rank = 4, 1
    *parts, residual = drawn(world_size + 1)
    expected = (((parts[0].float() + parts[1].float()) + parts[2].float()) + parts[3].float()).half()
    inboxes = Inboxes(world_size, rank)
    arriving = [torch.full_like(part, torch.nan).view(torch.int16).fill_(-1).view(torch.float16) for part in parts]
    for row in range(ROWS):
        if row % world_size == rank:
            for peer in range(world_size):
                arriving[peer][row] = parts[peer][row]
        else:
            arriving[row % world_size][row] = expected[row]
    inboxes.arrive(arriving)
    _, total = sum_norm(parts[rank], residual, residual[0].clone(), 1e-6, PLAIN, inboxes.slots)
    assert torch.equal(total, (expected.float() + residual.float()).half())
    assert inboxes.is_empty
    for peer in (0, 2, 3):
        sent = inboxes.slot(peer, rank, expected)
        assert torch.equal(sent[peer], parts[rank][peer]), "to the owner this rank's part"
        assert torch.equal(sent[rank], expected[rank]), "from the owner the sum"
        rest = [row for row in range(ROWS) if row not in (peer, rank)]
        assert (sent[rest].view(torch.int16) == -1).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_gathered_numbers_arrive_whatever_they_are(dtype):
    """A NaN whose bits mean "empty" arrives as another NaN, instead of being waited for."""
    parts = drawn(2, dtype)
    integers = parts[1].view(torch.int16 if dtype == torch.float16 else torch.int32)
    integers[0, :4] = torch.tensor([-1, 0, -2, 1], device=DEVICE)
    inboxes = Inboxes(2, 1)
    inboxes.arrive(parts)
    gathered = all_gather(parts[1], inboxes.slots)
    assert torch.equal(gathered.nan_to_num(7), torch.cat(parts, -1).nan_to_num(7))
    sent = inboxes.slot(0, 1, parts[1])
    assert torch.equal(sent.nan_to_num(7), parts[1].nan_to_num(7)) and sent[0, 0].isnan()
    assert not (sent.view(integers.dtype) == -1).any()


@pytest.mark.parametrize("gated", [False, True])
def test_quantised_by_the_largest_of_all_ranks(gated):
    gate_up = torch.cat(drawn(2), -1)
    x = silu_mul(gate_up).values if gated else drawn(1)[0]
    smoother = to_device(torch.rand(WIDTH, generator=torch.Generator().manual_seed(1)) + 0.5)
    own = (x.float() / smoother).abs().amax(-1)
    theirs = own * torch.tensor([0.5, 2, 0, 3], device=DEVICE)
    inboxes = Inboxes(2, 0)
    inboxes.arrive([own, theirs])
    result = quantise_over_ranks(gate_up if gated else x, smoother, inboxes.slots, gated)
    alone = quantise_rows(x, Int8PerToken(smoother))
    scale = torch.maximum(own, theirs) / 127
    torch.testing.assert_close(result.scaled[1], scale, rtol=2**-22, atol=0)  # a GPU's division
    assert torch.equal(result.values[::2], alone.values[::2]), "rows whose largest is this rank's"
    assert not torch.equal(result.values[1::2], alone.values[1::2])
    assert torch.equal(inboxes.slot(1, 0, own), own) and inboxes.is_empty


@pytest.mark.parametrize("precision", ["float16", "int8", "int4"])
def test_the_product_of_one_token_sends_its_part(precision):
    """The peers get what the product without slots makes, and the sum does not send it again."""
    world_size, rank = 2, 0
    generator = torch.Generator().manual_seed(2)
    x, matrix = torch.randn(1, WIDTH, generator=generator).half(), torch.randn(40, WIDTH, generator=generator)
    x, inboxes = to_device(x), Inboxes(world_size, rank)
    if precision == "float16":
        run = partial(gemv, x, to_device(matrix.half()), torch.float16)
    elif precision == "int8":
        run = partial(gemv_int, quantise_rows(x, Int16()), *to_device(quantise_int8(matrix)), torch.float16)
    else:
        weight = to_device(quantise_int4(matrix, 32, torch.float16))
        run = partial(gemv_int, quantise_rows(x, Int16(deinterleaved=True)), *weight, torch.float16)
    alone = run()
    assert inboxes.is_empty and (inboxes.memory == 255).all()
    part = run(slots=inboxes.slots)
    assert torch.equal(part, alone) and torch.equal(inboxes.slot(1, rank, part), part)
    inboxes.slot(1, rank, part).view(torch.int16).fill_(-1)  # the peer has taken it
    theirs, residual = drawn(2)[0][:1, :40].contiguous(), drawn(2)[1][:1, :40].contiguous()
    inboxes.arrive([part, theirs])
    _, total = sum_norm(part, residual, residual[0].clone(), 1e-6, PLAIN, inboxes.slots, sent=True)
    assert torch.equal(total, ((part.float() + theirs.float()).half().float() + residual.float()).half())
    assert (inboxes.memory == 255).all()


def wrong_numbers(steps: int, *fault: str) -> int:
    done = subprocess.run([sys.executable, PROGRAM, str(steps), *fault], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return int(done.stdout)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="several ranks on GPUs: test_multi_gpu.py")
def test_no_number_is_read_before_it_came_or_twice():
    """Three ranks in chains of all messages; the controls say that the chain would notice either."""
    assert wrong_numbers(8) == 0
    assert wrong_numbers(2, "wait") > 0
    assert wrong_numbers(2, "empty") > 0
