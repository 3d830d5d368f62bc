"""Assigns blocks of the KV cache to slots: from the prefix cache if possible, else from the pool.

Owns the block pool, the prefix index and the contents of the block tables. Knows nothing of priorities or budgets: the
scheduler asks `num_wanted` and `num_available`, and decides which sequence is preempted.

The choices of one request share the full blocks of their prompt through the index, too. The last, partly filled block
of the prompt is computed by each choice itself: at most one block of tokens, in the choice's first step. That is
cheaper than copy on write in every attention backend, and gives the same bits. With prefix caching off, the index holds
only prompts of such groups, and no block outlives its last reference.

A block that a prefill computes enters the index when the step is *planned*, not when it is done. This is correct
because within a step every layer writes the keys and values of all its tokens before any of them attends, so another
sequence of the same step may already read them. `forget` removes such blocks if the step fails. Blocks that decodes
fill enter the index together when their sequence leaves its slot: an answer can be sent back as a prompt only after its
end, and hashing each block in the step that fills it would slow down every step.
"""

import numpy as np
from numpy.typing import NDArray

from engine.kv_cache.block_pool import BlockPool
from engine.kv_cache.prefix_index import PrefixIndex
from engine.runner.slots import SequenceSlots
from engine.sequence import Sequence


class KVCacheManager:
    """Block tables over one pool. All sizes in blocks unless they say tokens."""

    def __init__(self, slots: SequenceSlots, num_blocks: int, *, prefix_caching: bool) -> None:
        self._slots = slots
        self._block_size = slots.block_size
        self._prefix_caching = prefix_caching
        self.index = PrefixIndex()
        self.pool = BlockPool(num_blocks, on_evict=self.index.remove)

    @property
    def num_available(self) -> int:
        return self.pool.num_available

    def match(self, sequence: Sequence) -> list[int]:
        """The cached blocks at the beginning of a waiting sequence; at least its last token remains to be computed.

        A cached token has neither logits nor a hidden state: where these are wanted, it is not looked for.
        """
        if not self._can_share(sequence):
            return []
        num_full = sequence.num_findable // self._block_size
        return self.index.find_all(self._digests(sequence, sequence.token_ids, num_full)[:num_full])

    def is_prompt_shared(self, slot: int) -> bool:
        """Whether all shareable blocks of the prompt are in the index, for the other choices of the slot's request."""
        sequence = self._slots.sequences[slot]
        return sequence.num_indexed_blocks >= (sequence.num_prompt_tokens - 1) // self._block_size

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_size)

    def num_wanted(self, sequence: Sequence, hits: list[int]) -> int:
        """How many available blocks admitting the sequence would take: new ones, and hits that are idle now."""
        num_idle = sum(map(self.pool.is_idle, hits))
        return self.num_blocks_for(sequence.num_tokens) - len(hits) + num_idle

    def admit(self, sequence: Sequence, hits: list[int]) -> None:
        """Fill the block table of the sequence's slot: `hits` shared, the rest new, room for all its present tokens.

        Needs `num_wanted` blocks to be available. Sets what the slot has computed to the hits' tokens.
        """
        slot = sequence.slot
        assert slot is not None
        num_blocks = self.num_blocks_for(sequence.num_tokens)
        table = self._slots.block_tables[slot]
        if hits:
            self.pool.share(hits)
            table[: len(hits)] = hits
        table[len(hits) : num_blocks] = self.pool.allocate(num_blocks - len(hits))
        self._slots.capacity[slot] = num_blocks * self._block_size
        self._slots.num_computed[slot] = len(hits) * self._block_size
        sequence.num_indexed_blocks = len(hits)

    def grow(self, slots: NDArray[np.int64]) -> None:
        """Append one new block to the table of each slot. Needs that many available."""
        tables, capacity = self._slots.block_tables, self._slots.capacity
        for slot, block in zip(slots.tolist(), self.pool.allocate(len(slots)), strict=True):  # a few in most steps
            tables[slot, self._num_blocks(slot)] = block
            capacity[slot] += self._block_size

    def num_missing(self, slot: int, num_tokens: int | None = None) -> int:
        """How many more blocks the slot needs for this many tokens (None: for its present tokens)."""
        wanted = self._slots.num_tokens.item(slot) if num_tokens is None else num_tokens
        return max(0, self.num_blocks_for(wanted) - self._num_blocks(slot))

    def shrink(self, slot: int, num_tokens: int) -> None:
        """Drop the blocks after those that this many tokens need; none of them is in the index."""
        num_blocks, num_kept = self._num_blocks(slot), self.num_blocks_for(num_tokens)
        if num_kept < num_blocks:
            self.pool.free(self._slots.block_tables[slot, num_kept:num_blocks].tolist())
            self._slots.capacity[slot] = num_kept * self._block_size

    def extend(self, slot: int, num_tokens: int | None = None) -> None:
        """Append the blocks that are missing to the slot's table (see `num_missing`). Needs them to be available."""
        num_blocks, num_missing = self._num_blocks(slot), self.num_missing(slot, num_tokens)
        if not num_missing:
            return
        self._slots.block_tables[slot, num_blocks : num_blocks + num_missing] = self.pool.allocate(num_missing)
        self._slots.capacity[slot] += num_missing * self._block_size

    def release(self, slot: int) -> None:
        """Drop the slot's blocks; with prefix caching the full ones stay in the index until they are evicted."""
        self.index_blocks(slot, int(self._slots.num_computed[slot]))
        self._drop(slot)

    def _drop(self, slot: int) -> None:
        self.pool.free(self._table(slot))
        if not self._prefix_caching:
            self.pool.evict_idle()
        self._slots.capacity[slot] = 0

    def discard(self, slot: int) -> None:
        """Drop the slot's blocks and remove them from the index: their content may be wrong."""
        self.forget(self._table(slot))
        self._drop(slot)

    def index_blocks(self, slot: int, num_tokens: int) -> list[int]:
        """Add the full blocks of the slot's first `num_tokens` tokens to the index; return the newly added ones."""
        sequence = self._slots.sequences[slot]
        if not self._can_share(sequence):
            return []
        if not self._prefix_caching:
            num_tokens = min(num_tokens, sequence.num_prompt_tokens)
        first, num_full = sequence.num_indexed_blocks, num_tokens // self._block_size
        if num_full <= first:
            return []
        digests = self._digests(sequence, self._slots.token_ids[slot], num_full)[first:num_full]
        blocks = self._slots.block_tables[slot, first:num_full].tolist()
        added = self.index.add(digests, blocks)
        self.pool.keep(added)
        sequence.num_indexed_blocks = num_full
        return added

    def forget(self, blocks: list[int]) -> None:
        """Remove blocks from the index, if they are in it; sequences that use them continue."""
        for block in blocks:
            if block in self.index:
                self.index.remove([block])
                self.pool.forget(block)

    def _digests(self, sequence: Sequence, token_ids: NDArray[np.int32], num_full: int) -> list[bytes]:
        """The digests of at least the first `num_full` blocks; computed once and stored in the sequence."""
        digests = sequence.block_digests
        if num_full > len(digests):
            parent = digests[-1] if digests else self.index.root(self._cache_key(sequence))
            tokens = token_ids[len(digests) * self._block_size : num_full * self._block_size]
            digests += self.index.chain(parent, tokens, self._block_size)
        return digests

    def _can_share(self, sequence: Sequence) -> bool:
        return self._prefix_caching or sequence.group_id is not None

    def _cache_key(self, sequence: Sequence) -> str:
        return sequence.cache_key if self._prefix_caching else f"group {sequence.group_id}"

    def _table(self, slot: int) -> list[int]:
        table: list[int] = self._slots.block_tables[slot, : self._num_blocks(slot)].tolist()
        return table

    def _num_blocks(self, slot: int) -> int:
        return self._slots.capacity.item(slot) // self._block_size

    def check_integrity(self) -> None:
        """Raise `AssertionError` unless the tables of the taken slots account for every reference and size."""
        references = np.zeros(self.pool.num_blocks, np.int64)
        for slot in self._slots.sequences:
            table = self._table(slot)
            assert len(set(table)) == len(table), f"slot {slot} holds a block twice"
            references += np.bincount(np.array(table, np.int64), minlength=self.pool.num_blocks)
            assert self._slots.num_computed[slot] <= len(table) * self._block_size, f"slot {slot} outgrew its blocks"
        self.pool.check_integrity(references)
        self.index.check_integrity()
        assert self.pool.kept == self.index.blocks, "the pool keeps other blocks than the index finds"
        assert self._prefix_caching or not self.pool.num_idle, "content is kept with prefix caching off"
