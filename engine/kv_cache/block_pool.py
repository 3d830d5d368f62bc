"""The KV blocks: which are free, how many sequences use each, and which hold content worth keeping.

A block is in one of three states: *used* (one reference or more), *idle* (none, but the prefix index knows its content;
evicted least recently used first) or *free* (nothing in it matters). Knows nothing of tokens, sequences or memory.
"""

from collections import OrderedDict
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray


class BlockPool:
    """`num_blocks` blocks with reference counts. `on_evict(block)` is called when an idle block's content goes."""

    def __init__(self, num_blocks: int, on_evict: Callable[[int], None]) -> None:
        self.num_blocks = num_blocks
        self._on_evict = on_evict
        self._references = np.zeros(num_blocks, np.int32)
        self._is_kept = np.zeros(num_blocks, np.bool_)
        self._free = np.arange(num_blocks - 1, -1, -1, dtype=np.int32)  # a stack; low ids first
        self._num_free = num_blocks
        self._idle: OrderedDict[int, None] = OrderedDict()  # least recently used first

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` can give: free and idle ones."""
        return self._num_free + len(self._idle)

    @property
    def num_idle(self) -> int:
        return len(self._idle)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_available

    def is_idle(self, block: int) -> bool:
        return block in self._idle

    def allocate(self, num_blocks: int) -> NDArray[np.int32]:
        """Take blocks with one reference each, evicting idle ones as needed. Needs `num_available >= num_blocks`."""
        assert num_blocks <= self.num_available, f"{num_blocks} blocks wanted, {self.num_available} available"
        if self._num_free < num_blocks:
            self._evict_oldest(num_blocks - self._num_free)
        self._num_free -= num_blocks
        blocks = self._free[self._num_free : self._num_free + num_blocks][::-1].copy()
        self._references[blocks] = 1
        return blocks

    def share(self, blocks: list[int]) -> None:
        """Add a reference to used or idle blocks (each at most once in the list)."""
        for block in blocks:
            self._idle.pop(block, None)
        self._references[blocks] += 1

    def free(self, blocks: NDArray[np.int32]) -> None:
        """Drop a reference to each.

        Blocks are given in order of position. Of those that stay idle the last is evicted first, because a prefix is
        of use without its continuation and not the other way round.
        """
        self._references[blocks] -= 1
        references = self._references[blocks]
        assert (references >= 0).all(), "a block was freed twice"
        unused = blocks[references == 0]
        is_kept = self._is_kept[unused]
        for block in unused[is_kept][::-1].tolist():
            self._idle[block] = None
        self._push_free(unused[~is_kept])

    def keep(self, blocks: list[int]) -> None:
        """The blocks' content is in the prefix index: they turn idle, not free, when their last reference goes."""
        for block in blocks:  # mostly one: an index array costs ten times as much
            self._is_kept[block] = True

    def forget(self, block: int) -> None:
        """The block's content is in the prefix index no more."""
        self._is_kept[block] = False
        if block in self._idle:
            del self._idle[block]
            self._push_free(np.array([block], np.int32))

    def evict_idle(self) -> None:
        """Give up the content of every idle block."""
        if self._idle:
            self._evict_oldest(len(self._idle))

    def _evict_oldest(self, num_blocks: int) -> None:
        evicted = [self._idle.popitem(last=False)[0] for _ in range(num_blocks)]
        for block in evicted:
            self._is_kept[block] = False
            self._on_evict(block)
        self._push_free(np.array(evicted, np.int32))

    def _push_free(self, blocks: NDArray[np.int32]) -> None:
        self._free[self._num_free : self._num_free + len(blocks)] = blocks
        self._num_free += len(blocks)

    def check_integrity(self, references: NDArray[np.int64]) -> None:
        """Raise `AssertionError` unless each block is in one state and used as often as `references` `[num_blocks]`."""
        assert (self._references == references).all(), "reference counts differ from the block tables"
        free = self._free[: self._num_free]
        states = self._references > 0
        occurrences = states.astype(np.int64) + np.bincount(free, minlength=self.num_blocks)
        occurrences[list(self._idle)] += 1
        assert (occurrences == 1).all(), f"blocks in no state or in two: {np.flatnonzero(occurrences != 1).tolist()}"
        assert not self._is_kept[free].any(), "a free block is kept"
        assert self._is_kept[list(self._idle)].all(), "an idle block is not kept"
