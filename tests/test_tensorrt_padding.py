"""How a step's tokens are padded to the shapes of a plan, and how many one may hold."""

import pytest
import torch

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")

import trt_cases as cases

from baichuan.errors import UnsupportedError
from baichuan.executors.tensorrt.contract import FREE_SLOT
from baichuan.executors.tensorrt.padding import decode_run, prefill_runs
from baichuan.records import Step


def test_padding_of_a_prefill():
    """Two sequences, one with a past, in windows of two tokens; sequence 1 has no token in the second window."""
    step = Step.of([[1, 2, 3], [4]], [5, 0])
    first, second = prefill_runs(step, max_new=2, max_outputs=8)
    assert first.input_ids.tolist() == [[1, 2], [4, 0]]
    assert first.positions.tolist() == [[5, 6], [0, 0]]
    assert first.key_positions.tolist() == [[5, 6], [0, FREE_SLOT]]
    assert first.write_index.tolist() == [5, 0]
    assert first.output_rows.tolist() == [2] and first.destinations.tolist() == [1]
    assert second.input_ids.tolist() == [[3], [0]]
    assert second.write_index.tolist() == [7, 1]  # behind what the sequence holds, so that padding overwrites nothing
    assert second.output_rows.tolist() == [0] and second.destinations.tolist() == [0]
    assert first.most_tokens == 7 and second.most_tokens == 8


def test_padding_keeps_to_the_number_of_outputs():
    step = Step.of([[1, 2, 3], [4, 5, 6]], all_outputs=True)
    runs = list(prefill_runs(step, max_new=64, max_outputs=2))
    assert [run.new for run in runs] == [1, 1, 1]
    assert torch.cat([run.destinations for run in runs]).sort().values.tolist() == list(range(6))
    assert len(list(prefill_runs(step, max_new=64, max_outputs=6))) == 1


def test_a_decode_step_is_a_column():
    run = decode_run(Step.of([[1], [2]], [3, 0]))
    assert run.input_ids.tolist() == [[1], [2]] and run.write_index.tolist() == [3, 0]
    assert run.most_tokens == 4


@pytest.mark.parametrize("quant", ["none", "kv_int8"])
def test_too_long_is_one_sentence(quant):
    executor = cases.network(quant=cases.QUANTS[quant]).executor()
    with pytest.raises(UnsupportedError, match="1 sequences of 41 tokens do not fit a plan for 6 of 40"):
        executor.reset(1, 41)
    with pytest.raises(UnsupportedError, match="7 sequences of 8 tokens do not fit"):
        executor.reset(7, 8)
    executor.reset(1, 40)
    with pytest.raises(UnsupportedError, match="a sequence of 41 tokens, padding included, does not fit"):
        executor.forward(Step.of([[1] * 41]))


def test_a_capacity_can_be_filled_to_the_last_token():
    for quant in ("none", "kv_int8"):
        executor = cases.network(quant=cases.QUANTS[quant]).executor()
        executor.reset(1, 40)
        whole = executor.forward(Step.of([list(range(40))]))
        executor.reset(1, 40)
        executor.forward(Step.of([list(range(39))]))
        torch.testing.assert_close(
            executor.forward(Step.of([[39]], [39])), whole, rtol=0, atol=0.2 * bool(quant != "none") + 1e-4
        )
