"""The KV blocks: which are free, how many sequences use each, and which hold cached content.

A block is in one of three states: *used* (one reference or more), *idle* (no reference, but the prefix index knows its
content; evicted least recently used first) or *free* (no useful content). Knows nothing of tokens, sequences or memory.

Uses plain lists and dictionaries: a sequence takes and returns a few blocks, for which numpy is several times slower.
"""

from collections import OrderedDict
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray


class BlockPool:
    """`num_blocks` blocks with reference counts. Calls `on_evict(blocks)` when the content of idle blocks is
    dropped."""

    def __init__(self, num_blocks: int, on_evict: Callable[[list[int]], None]) -> None:
        self.num_blocks = num_blocks
        self._on_evict = on_evict
        self._references: dict[int, int] = {}  # of used blocks
        self._kept: set[int] = set()  # used or idle
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack; low ids first
        self._idle: OrderedDict[int, None] = OrderedDict()  # least recently used first

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` can give: free and idle ones."""
        return len(self._free) + len(self._idle)

    @property
    def num_idle(self) -> int:
        return len(self._idle)

    @property
    def num_used(self) -> int:
        return len(self._references)

    @property
    def kept(self) -> frozenset[int]:
        """Blocks whose content is in the prefix index."""
        return frozenset(self._kept)

    def is_idle(self, block: int) -> bool:
        return block in self._idle

    def allocate(self, num_blocks: int) -> list[int]:
        """Take blocks with one reference each, evicting idle ones as needed. Needs `num_available >= num_blocks`."""
        assert num_blocks <= self.num_available, f"{num_blocks} blocks wanted, {self.num_available} available"
        free = self._free
        if len(free) < num_blocks:
            self._evict_oldest(num_blocks - len(free))
        num_left = len(free) - num_blocks
        blocks = free[num_left:]
        blocks.reverse()
        del free[num_left:]
        self._references.update(dict.fromkeys(blocks, 1))
        return blocks

    def share(self, blocks: list[int]) -> None:
        """Add a reference to used or idle blocks."""
        references = self._references
        for block in blocks:
            self._idle.pop(block, None)
            references[block] = references.get(block, 0) + 1

    def free(self, blocks: list[int]) -> None:
        """Drop a reference to each.

        Blocks are given in order of position. Of those that stay idle the last is evicted first, because a prefix is
        of use without its continuation and not the other way round.
        """
        references, kept, idle = self._references, self._kept, self._idle
        for block in reversed(blocks):
            num_references = references.pop(block, 0)
            assert num_references, f"block {block} was freed twice"
            if num_references > 1:
                references[block] = num_references - 1
            elif block in kept:
                idle[block] = None
            else:
                self._free.append(block)

    def keep(self, blocks: list[int]) -> None:
        """The blocks' content is in the prefix index: without references they become idle, not free."""
        self._kept.update(blocks)

    def forget(self, block: int) -> None:
        """The block's content is no longer in the prefix index."""
        self._kept.discard(block)
        if block in self._idle:
            del self._idle[block]
            self._free.append(block)

    def evict_idle(self) -> None:
        """Drop the content of every idle block."""
        self._evict_oldest(len(self._idle))

    def _evict_oldest(self, num_blocks: int) -> None:
        evicted = [self._idle.popitem(last=False)[0] for _ in range(num_blocks)]
        self._kept.difference_update(evicted)
        self._on_evict(evicted)
        self._free += evicted

    def check_integrity(self, references: NDArray[np.int64]) -> None:
        """Raise `AssertionError` unless each block is in one state and used as often as `references` `[num_blocks]`."""
        used = np.flatnonzero(references)
        expected = dict(zip(used.tolist(), references[used].tolist(), strict=True))
        assert self._references == expected, "reference counts differ from the block tables"
        occurrences = np.bincount([*self._references, *self._free, *self._idle], minlength=self.num_blocks)
        assert (occurrences == 1).all(), f"blocks in no state or in two: {np.flatnonzero(occurrences != 1).tolist()}"
        assert self._kept.isdisjoint(self._free), "a free block is kept"
        assert self._kept.issuperset(self._idle), "an idle block is not kept"
