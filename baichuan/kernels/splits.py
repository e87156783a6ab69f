"""Into how many splits decode_attention cuts the keys of each pair of (sequence, head)."""

from __future__ import annotations

from typing import NamedTuple

from baichuan.kernels.spec import next_power_of_2

# What measures fastest on an H100 and an H200.  Few pairs have many small programs, and a kernel that combines their
# splits takes less time than the last of them would.
FEW_PAIRS = 64  # up to so many pairs have MAX_SPLITS splits each
PROGRAMS = 640  # with more pairs and short rows: most programs in all, but at least one for each pair
MOST_PROGRAMS = 5120  # the same where rows are long
MOST_KEYS = 256  # most keys of a split, while a row may have more splits: the longest rows then end with the others
MAX_SPLITS = 32  # most splits of a row
MOST_COUNTED = MOST_PROGRAMS // 2  # most pairs with two splits or more, where the split that ends last combines them


class Splits(NamedTuple):
    """Bounds of a row's number of splits, both powers of two: between them it has one for each MOST_KEYS keys.

    Where they are equal, and not 1, a kernel of its own combines the splits.
    """

    least: int
    most: int


def choose_splits(pairs: int) -> Splits:
    """The bounds for so many pairs of (sequence, head).

    They do not depend on the rows' lengths, so that one captured graph serves all lengths: the kernel reads those, and
    programs of splits without keys, which are the grid's last, take little time.
    """
    if pairs <= FEW_PAIRS:
        return Splits(MAX_SPLITS, MAX_SPLITS)
    least, most = (next_power_of_2(max(programs // pairs, 1) + 1) // 2 for programs in (PROGRAMS, MOST_PROGRAMS))
    return Splits(least, min(most, MAX_SPLITS))
