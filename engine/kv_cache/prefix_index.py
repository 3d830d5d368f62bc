"""Finds the KV block that already holds a given prefix.

The digest of a full block is a 128-bit BLAKE2b hash of the previous block's digest and the block's tokens, so equal
digests mean that the whole prefixes are equal. The first block's parent is a root, derived from what else must keep
prefixes apart, such as the tenant. Knows nothing of references or eviction.
"""

from functools import lru_cache
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

DIGEST_BYTES = 16


class PrefixIndex:
    """Maps digests to blocks and back; one block per digest and one digest per block."""

    def __init__(self) -> None:
        self._block_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}

    @staticmethod
    @lru_cache(maxsize=1024)
    def root(cache_key: str) -> bytes:
        """The parent of a sequence's first block; sequences with equal keys share prefixes."""
        return blake2b(
            cache_key.encode(errors="surrogatepass"), digest_size=DIGEST_BYTES, person=b"prefix root"
        ).digest()

    @staticmethod
    def chain(parent: bytes, token_ids: NDArray[np.int32], block_size: int) -> list[bytes]:
        """The digests of the full blocks of tokens that follow `parent`, one after the other."""
        data = token_ids.tobytes()
        width = block_size * token_ids.itemsize
        digests: list[bytes] = []
        for start in range(0, len(data) - width + 1, width):
            parent = blake2b(parent + data[start : start + width], digest_size=DIGEST_BYTES).digest()
            digests.append(parent)
        return digests

    def find_all(self, digests: list[bytes]) -> list[int]:
        """The blocks of the longest known prefix of `digests`."""
        blocks: list[int] = []
        for digest in digests:
            block = self._block_of.get(digest)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def add(self, digests: list[bytes], blocks: list[int]) -> list[int]:
        """Add the blocks, except those whose prefix another block holds already; return the added ones."""
        added: list[int] = []
        for digest, block in zip(digests, blocks, strict=True):
            if self._block_of.setdefault(digest, block) == block:
                self._digest_of[block] = digest
                added.append(block)
        return added

    def remove(self, blocks: list[int]) -> None:
        """Forget blocks that are in the index."""
        for block in blocks:
            del self._block_of[self._digest_of.pop(block)]

    @property
    def blocks(self) -> frozenset[int]:
        return frozenset(self._digest_of)

    def __contains__(self, block: int) -> bool:
        return block in self._digest_of

    def __len__(self) -> int:
        return len(self._block_of)

    def check_integrity(self) -> None:
        """Raise `AssertionError` unless the two maps mirror each other."""
        assert len(self._block_of) == len(self._digest_of), "digests and blocks do not pair up"
        assert all(self._block_of[digest] == block for block, digest in self._digest_of.items())
