"""Blocks of the KV cache: who holds them, which are free, and which still hold a known prefix.

A block is `block_size` consecutive tokens of one sequence (PagedAttention, arXiv:2309.06180). Several sequences may hold the same
block when their beginnings are equal; it is free when nobody holds it. A free block keeps its contents, and may be found again by
the hash of everything up to its end, until it is handed out for something else (least recently used first).
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np

NULL_BLOCK = 0  # never handed out and always zero: what padding reads


class BlockPool:
    """All blocks of one engine. Every method is O(blocks it touches). fresh: those that were handed out, for a step to clear."""

    def __init__(self, num_blocks: int, block_size: int, caching: bool = True) -> None:
        self.num_blocks, self.block_size, self.caching = num_blocks, block_size, caching
        self.ref_counts = [0] * num_blocks
        self.ref_counts[NULL_BLOCK] = 1
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_blocks))  # next to be handed out first
        self._block_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}
        self.fresh: list[int] = []

    @property
    def num_usable(self) -> int:
        """Blocks that sequences can ever hold."""
        return self.num_blocks - 1

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Blocks that hold a known prefix."""
        return len(self._hash_of)

    def allocate(self, count: int) -> list[int]:
        """Hand out `count` blocks with one reference each; the caller has looked at `num_free`."""
        blocks = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block in blocks:
            self._forget(block)
            self.ref_counts[block] = 1
        self.fresh += blocks
        return blocks

    def share(self, blocks: Sequence[int]) -> None:
        """One more reference to each block, taking it off the free list if nobody held it."""
        for block in blocks:
            if self.ref_counts[block] == 0:
                del self._free[block]
            self.ref_counts[block] += 1

    def free(self, blocks: Sequence[int]) -> None:
        """Drop one reference to each. The last blocks of a sequence are reused first, since a prefix is worth more than its end;
        a block without a known prefix goes to the front, so that a small load touches little memory."""
        for block in reversed(blocks):
            self.ref_counts[block] -= 1
            if self.ref_counts[block] == 0:
                self._free[block] = None
                if block not in self._hash_of:
                    self._free.move_to_end(block, last=False)

    def remember(self, block: int, chain: bytes) -> bool:
        """Make a full block findable by the hash of everything up to its end. False where another with that content is known."""
        if not self.caching or chain in self._block_of:
            return False
        self._forget(block)
        self._block_of[chain] = block
        self._hash_of[block] = chain
        return True

    def find(self, chains: Sequence[bytes]) -> list[int]:
        """The longest run of known blocks for a chain of hashes. Takes no references."""
        found: list[int] = []
        for chain in chains:
            block = self._block_of.get(chain)
            if block is None:
                break
            found.append(block)
        return found

    def num_held(self, blocks: Sequence[int]) -> int:
        """How many of these blocks somebody holds: sharing them takes nothing from the free list."""
        return sum(self.ref_counts[b] > 0 for b in blocks)

    def forget(self, blocks: Iterable[int]) -> None:
        """Blocks that do not hold what they were remembered for."""
        for block in blocks:
            self._forget(block)

    def forget_all(self) -> None:
        """Drop every known prefix (for measuring, and for tests)."""
        self._block_of.clear()
        self._hash_of.clear()

    def _forget(self, block: int) -> None:
        chain = self._hash_of.pop(block, None)
        if chain is not None:
            del self._block_of[chain]


def hash_blocks(tokens: np.ndarray, block_size: int, chain: Sequence[bytes]) -> list[bytes]:
    """Hashes of the full blocks of `tokens` (int32 [n]) that `chain` does not have yet; each covers all tokens up to its end.

    128-bit BLAKE2b: two different prefixes never meet in practice, unlike with Python's own `hash`.
    """
    new: list[bytes] = []
    parent = chain[-1] if chain else b""
    data = np.ascontiguousarray(tokens, dtype=np.int32)
    for i in range(len(chain), len(tokens) // block_size):
        parent = hashlib.blake2b(parent + data[i * block_size : (i + 1) * block_size].tobytes(), digest_size=16).digest()
        new.append(parent)
    return new
