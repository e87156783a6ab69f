"""The block tables of one request: a row for each of its beams, sharing blocks as long as none writes into them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from baichuan.generation.blocks import BlockPool


class BlockTables:
    """Rows of one length.  Row r keeps token t in block rows[r][t // tokens_per_block]."""

    def __init__(self, pool: BlockPool, found: Sequence[int] = ()):
        """found: the blocks of a prefix that the pool knows"""
        self._pool = pool
        for block in found:
            pool.hold(block)
        self.rows: list[list[int]] = [list(found)]

    def needed(self, start: int, end: int) -> int:
        """How many blocks make_room(start, end) allocates."""
        if len(self.rows) == 1:
            return max(self._blocks(end) - len(self.rows[0]), 0)
        appended = sum(max(self._blocks(end) - len(row), 0) for row in self.rows)
        return appended + sum(count - 1 for count in self._written(start).values())

    def make_room(self, start: int, end: int) -> list[tuple[int, int]]:
        """Give each row blocks of its own for tokens `start` to `end`.

        Returns the (source, target) of each block whose tokens before `start` are to be copied first.
        """
        copies, written = [], self._written(start)
        for row in self.rows:
            if start % self._pool.tokens_per_block:
                last = start // self._pool.tokens_per_block
                source = row[last]
                if written[source] > 1:  # the last row that shares the block keeps it
                    written[source] -= 1
                    row[last] = self._pool.allocate()
                    copies.append((source, row[last]))
                    self._pool.release([source])
            while len(row) < self._blocks(end):
                row.append(self._pool.allocate())
        return copies

    def fork(self, parents: Sequence[int]) -> None:
        """Row r becomes what row parents[r] was."""
        old = self.rows
        self.rows = [list(old[parent]) for parent in parents]
        for row in self.rows:
            for block in row:
                self._pool.hold(block)
        for row in old:
            self._pool.release(row)

    def release(self) -> None:
        """Let go of every block."""
        for row in self.rows:
            self._pool.release(row)
        self.rows = [[]]

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self._pool.tokens_per_block)

    def _written(self, start: int) -> Counter[int]:
        """How many rows hold each block that a token at `start` is written into beside older ones."""
        if start % self._pool.tokens_per_block == 0:
            return Counter()
        return Counter(row[start // self._pool.tokens_per_block] for row in self.rows)
