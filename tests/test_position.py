"""Slopes and rotations against the original code's and float64."""

import goldens
import numpy as np
import pytest
import torch

from baichuan.model import position
from baichuan.records import AttentionSpec


@pytest.mark.parametrize("heads", [5, 8, 10, 20, 32, 40])
def test_slopes_equal_the_originals(heads):
    expected = goldens.alibi()[f"slopes_{heads}"].float()
    torch.testing.assert_close(position.alibi_slopes(heads), expected, rtol=1e-6, atol=0)  # one rounding each
    assert not torch.allclose(position.alibi_slopes(heads).roll(1), expected)


def test_the_rope_table_is_right_far_beyond_the_trained_length():
    cos, sin = position.rope_table(20000, AttentionSpec(1, 0, 1, 128, True))
    angles = np.arange(20000)[:, None] * 10000.0 ** -(np.arange(0, 128, 2) / 128)
    # Half a unit in the last place of a float32 of size 1, and float64's own error in the largest angles.
    assert np.abs(cos.double().numpy() - np.cos(angles)).max() < 6.1e-8
    assert np.abs(sin.double().numpy() - np.sin(angles)).max() < 6.1e-8


def test_rotation_turns_pairs_of_the_two_halves():
    x = torch.randn(5, 2, 8, dtype=torch.float64)
    cos, sin = position.rope_table(5, AttentionSpec(1, 0, 1, 8, True))
    turned = position.rotate(x.float(), cos, sin).double()
    pairs = torch.complex(x[..., :4], x[..., 4:]) * torch.complex(cos.double(), sin.double())[:, None]
    torch.testing.assert_close(turned, torch.cat((pairs.real, pairs.imag), -1), rtol=0, atol=1e-6)
    assert not torch.allclose(turned[1:], x[1:])
    torch.testing.assert_close(turned[0], x[0], rtol=0, atol=1e-6)  # position 0 stays
