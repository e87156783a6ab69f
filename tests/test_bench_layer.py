"""What bench_layer.py makes of a profile; profiling itself needs a GPU."""

import pytest

from benchmarks import bench_layer

LAYER = (("_decode_attention", 5.0), ("_gemv", 20.0), ("_add_rms_norm", 2.0))
HEAD, EMBEDDING = ("_gemv", 100.0), ("_gather_rows", 3.0)


def replays(layers):
    """(name, end) of two steps of these layers."""
    kernels, now = [], 0.0
    for _ in range(2):
        for name, time in (EMBEDDING, *(kernel for layer in layers for kernel in layer), HEAD):
            now += time
            kernels.append((name, now))
    return kernels


@pytest.mark.parametrize("attention", ["_decode_attention", "_prefill_attention"])
def test_times_are_from_one_kernels_end_to_the_next_ones(attention):
    layer = ((attention, 5.0), *LAYER[1:])
    assert bench_layer.layer_times(replays([layer] * 4)) == list(layer)


def test_the_head_belongs_to_no_layer():
    times = bench_layer.layer_times(replays([LAYER] * 3)[::-1])
    assert sum(time for _, time in times) == pytest.approx(27)


def test_a_slow_replay_does_not_count():
    slow = (LAYER[0], ("_gemv", 500.0), LAYER[2])
    assert bench_layer.layer_times(replays([LAYER, LAYER, slow, LAYER])) == list(LAYER)


def test_without_a_gpu_it_says_so(capsys):
    assert bench_layer.main([]) == 2
    assert "bench_layer.py needs a GPU" in capsys.readouterr().err
