"""The kernels that steps of the real models launch, with every size and constant, are those of launches.txt.

A change that means to launch something else writes the file anew (launches.py) and shows in its difference.
"""

import pytest
from launches import CASES, launches, recorded, title


@pytest.mark.parametrize("case", CASES, ids=title)
def test_launches_are_the_recorded_ones(case):
    assert launches(*case) == recorded()[title(case)]


def test_every_recorded_step_is_a_case():
    assert list(recorded()) == [title(case) for case in CASES]


@pytest.mark.parametrize(
    "one, other",
    [
        (("v2_13b", "int8", "prefill 1 x 300", ""), ("v2_13b", "int8", "prefill 1 x 300", "copies")),
        (("v2_13b", "int8", "decode 1", ""), ("v2_13b", "int4", "decode 1", "")),
        (("v2_13b", "float16", "decode 1", ""), ("v1_7b", "float16", "decode 1", "")),
    ],
)
def test_another_choice_is_another_list(one, other):
    assert recorded()[title(one)] != recorded()[title(other)]
