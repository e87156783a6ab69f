"""GPUs are hidden from a run of pytest exactly where its marker expression selects no test that needs one."""

import os

import pytest
from gpu_marks import asks_for_gpus


@pytest.mark.parametrize(
    "expression",
    [
        "",
        "cuda",
        "multi_gpu",
        "cuda or multi_gpu",
        "slow and cuda",
        "slow or cuda",
        "not slow",
        "not slow and not cuda",
    ],
)
def test_gpus_are_seen(expression):
    assert asks_for_gpus(expression)


@pytest.mark.parametrize(
    "expression",
    [
        "not slow and not cuda and not multi_gpu",  # pyproject.toml's
        " not (cuda  or multi_gpu)",
        "slow",
        "slow and not cuda",
        "released_tokenizers",
        "not cuda and",  # which pytest refuses
        "cuda(1)",
    ],
)
def test_gpus_are_hidden(expression):
    assert not asks_for_gpus(expression)


def test_this_run_hides_them(pytestconfig):
    """A worker of pytest-xdist has the expression, and the environment, of the process that started it."""
    assert asks_for_gpus(pytestconfig.option.markexpr) or os.environ["CUDA_VISIBLE_DEVICES"] == ""
