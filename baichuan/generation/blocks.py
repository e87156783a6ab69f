"""Which blocks of the KV cache are free, held or shared.  No tensors here: blocks are numbers.

A block that is full can be found again by its name, a digest of all tokens from the sequence's start to the block's
end: a sequence that starts with the same tokens holds the same blocks.  Nobody needs to hold a block for it to be
found; the one that was held longest ago is overwritten first.

    tokens_per_block = 4, two sequences:   7 7 7 7 | 5 5 5 5 | 1 2       blocks 0 1 2
                                           7 7 7 7 | 5 5 5 5 | 9         blocks 0 1 3
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b


class BlockPool:
    """The blocks 0 to blocks - 1, each for tokens_per_block tokens."""

    def __init__(self, blocks: int, tokens_per_block: int, prefix_caching: bool = True):
        """prefix_caching: whether blocks are found again by name"""
        self.blocks, self.tokens_per_block, self.prefix_caching = blocks, tokens_per_block, prefix_caching
        self.forget()

    def forget(self) -> None:
        """Free every block, and its name with it."""
        self._references = [0] * self.blocks
        self._empty = list(range(self.blocks - 1, -1, -1))  # unnamed blocks held by nobody
        self._idle: OrderedDict[int, None] = OrderedDict()  # named blocks held by nobody, least recently held first
        self._names: dict[int, bytes] = {}
        self._named: dict[bytes, int] = {}

    @property
    def free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._empty) + len(self._idle)

    def references(self, block: int) -> int:
        """How often the block is held."""
        return self._references[block]

    def allocate(self) -> int:
        """A block of no name, held once.  There must be a free one."""
        if self._empty:
            block = self._empty.pop()
        else:
            block, _ = self._idle.popitem(last=False)
            del self._named[self._names.pop(block)]
        self._references[block] = 1
        return block

    def hold(self, block: int) -> None:
        """Hold the block once more."""
        self._idle.pop(block, None)
        self._references[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Let go of each of a sequence's blocks once: the last is the first to be overwritten."""
        for block in reversed(blocks):
            self._references[block] -= 1
            assert self._references[block] >= 0, "a block is let go more often than it was held"
            if self._references[block] == 0:
                if block in self._names:
                    self._idle[block] = None
                else:
                    self._empty.append(block)

    def name(self, block: int, name: bytes) -> None:
        """Let the block, which is full, be found; where another has the name already, that one is."""
        if self.prefix_caching and block not in self._names and self._named.setdefault(name, block) == block:
            self._names[block] = name

    def find(self, names: Sequence[bytes]) -> list[int]:
        """The blocks of the first names, as far as they are known.  They are not held by that."""
        found = []
        for name in names:
            if (block := self._named.get(name)) is None:
                break
            found.append(block)
        return found

    def idle(self, blocks: Sequence[int]) -> int:
        """How many of these blocks nobody holds."""
        return sum(self._references[block] == 0 for block in blocks)


def names_of(tokens: Sequence[int], tokens_per_block: int, known: Sequence[bytes] = ()) -> list[bytes]:
    """The name of each full block of a sequence.  known: the first names, as far as they are known."""
    names = list(known)
    for first in range(len(names) * tokens_per_block, len(tokens) - tokens_per_block + 1, tokens_per_block):
        digest = blake2b(names[-1] if names else b"", digest_size=16)
        digest.update(array("q", tokens[first : first + tokens_per_block]).tobytes())
        names.append(digest.digest())
    return names
