"""The forms in which a product takes its activations, and activations in such a form.

The kernel that makes a row (norm.py, silu.py, rows.py) writes it in the form that the product after it asks for:
store_row.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Plain:
    """[num_tokens, in_features] in the model's dtype."""


@dataclass(frozen=True)
class Deinterleaved:
    """As Plain, each row's even columns before its odd ones: a byte of 4-bit weights holds one of each."""


@dataclass(frozen=True)
class Int16:
    """16-bit integers with a scale for each token, max|row| / 32639, as two rows of int8: x = 256 * high + low.

    [2 * num_tokens, in_features] int8, each token's high bytes before its low ones, both signed.  Products with
    integer weights are exact sums, and 16 bits say more than the 11 significant ones of float16.
    deinterleaved: each row's even columns before its odd ones; in_features is then a multiple of 8
    sums: for weights with zeros, how many channels a group has, a power of two or all of them; the sums of x / scale
    over each group, times 16, then lie behind the scales in float32.  None = there are no sums
    """

    deinterleaved: bool = False
    sums: int | None = None


@dataclass(frozen=True)
class Int8PerToken:
    """int8 of x / smoother with a scale for each token, max|row| / 127."""

    smoother: Tensor | None = None  # [in_features] float32
    over_ranks: bool = False  # the maximum is that of every rank's row, whose channels the ranks share


@dataclass(frozen=True)
class E4m3PerToken:
    """e4m3 with a scale for each token, max|row| / 448 and at least 2^-100 (quant/fp8.py)."""


@dataclass(frozen=True)
class StaticScale:
    """8-bit numbers of x / smoother with a scale that is known before."""

    dtype: torch.dtype  # int8 or float8_e4m3fn
    scale: Tensor  # [1] or [num_tokens] float32
    smoother: Tensor | None = None  # [in_features] float32


Form = Plain | Deinterleaved | Int16 | Int8PerToken | E4m3PerToken | StaticScale
WHOLE_ROWS = (Int16, Int8PerToken, E4m3PerToken)  # the forms whose scale needs the maximum of a row


@dataclass(frozen=True)
class Operand:
    """Activations in one of the forms."""

    form: Form
    values: Tensor  # [num_tokens, in_features]; Int16: [2 * num_tokens, in_features]
    scale: Tensor | None = None  # [num_tokens] or [1] float32, then Int16's sums; None where the values are x itself

    @property
    def scaled(self) -> tuple[Tensor, Tensor]:
        """The values and their scale, of a form that has one."""
        assert self.scale is not None, self.form
        return self.values, self.scale

    @staticmethod
    def allocate(form: Form, x: Tensor, num_tokens: int, width: int) -> Operand:
        """Room for `width` columns, on x's device and, where the form keeps it, in x's dtype."""
        match form:
            case Plain() | Deinterleaved():
                return Operand(form, x.new_empty(num_tokens, width))
            case Int16(sums=sums):
                values = x.new_empty(2 * num_tokens, width, dtype=torch.int8)
                numbers = num_tokens * (1 + width // sums) if sums else num_tokens
                return Operand(form, values, x.new_empty(numbers, dtype=torch.float32))
            case Int8PerToken():
                values = x.new_empty(num_tokens, width, dtype=torch.int8)
            case E4m3PerToken():
                values = x.new_empty(num_tokens, width, dtype=torch.float8_e4m3fn)
            case StaticScale(dtype, scale):
                return Operand(form, x.new_empty(num_tokens, width, dtype=dtype), scale)
        return Operand(form, values, x.new_empty(num_tokens, dtype=torch.float32))


PLAIN = Plain()


def plain(x: Tensor) -> Operand:
    """x as it is."""
    return Operand(PLAIN, x)


def smoother_of(form: Form) -> Tensor | None:
    """What the values are divided by before they are quantised, if anything."""
    return form.smoother if isinstance(form, Int8PerToken | StaticScale) else None
