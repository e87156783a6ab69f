"""Into how many splits decode_attention cuts the keys of each pair of (sequence, head)."""

from __future__ import annotations

from typing import NamedTuple

from baichuan.kernels.spec import next_power_of_2

# What measures fastest on an H100 and an H200.  Few pairs have many small programs, and a kernel that combines their
# splits takes less time than the last of them would.
FEW_PAIRS = 64
PROGRAMS = 640  # that the pairs are split into, where they are not few ...
MOST_PROGRAMS = 5120  # ... and up to so many, where rows are long
MOST_KEYS = 256  # of a split in such a row: the longest rows then end with the others
MAX_SPLITS = 32
MOST_COUNTED = MOST_PROGRAMS // 2  # pairs of which the last split combines them all


class Splits(NamedTuple):
    """Of each row, both powers of two.  As many at least as at most: a kernel of its own combines them."""

    least: int
    most: int  # where a row has more than MOST_KEYS keys for each of the least


def choose_splits(pairs: int) -> Splits:
    """It does not depend on the rows' lengths, so that one captured graph serves them all: the kernel sees a row's
    length, and the splits without keys, which are the grid's last, take little time.
    """
    if pairs <= FEW_PAIRS:
        return Splits(MAX_SPLITS, MAX_SPLITS)
    least, most = (next_power_of_2(max(programs // pairs, 1) + 1) // 2 for programs in (PROGRAMS, MOST_PROGRAMS))
    return Splits(least, min(most, MAX_SPLITS))
