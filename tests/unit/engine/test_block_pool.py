import numpy as np
import pytest

from engine.kv_cache.block_pool import BlockPool


@pytest.fixture
def evicted() -> list[int]:
    return []


@pytest.fixture
def pool(evicted: list[int]) -> BlockPool:
    return BlockPool(6, on_evict=evicted.extend)


def references(pool: BlockPool, *tables: list[int]) -> "np.ndarray":
    counts = np.zeros(pool.num_blocks, np.int64)
    for table in tables:
        counts += np.bincount(np.array(table, np.int64), minlength=pool.num_blocks)
    return counts


def test_a_block_is_free_again_when_its_last_reference_goes(pool: BlockPool) -> None:
    blocks = pool.allocate(2)
    pool.share(blocks)
    pool.free(blocks)
    assert pool.num_used == 2
    pool.check_integrity(references(pool, blocks))
    pool.free(blocks)
    assert (pool.num_used, pool.num_available, pool.num_idle) == (0, 6, 0)
    pool.check_integrity(references(pool))


def test_kept_blocks_turn_idle_and_can_be_shared_again(pool: BlockPool, evicted: list[int]) -> None:
    blocks = pool.allocate(2)
    pool.keep(blocks)
    pool.free(blocks)
    assert pool.num_idle == 2 and pool.num_available == 6
    pool.share(blocks)
    assert pool.num_idle == 0 and pool.num_used == 2 and not evicted
    pool.check_integrity(references(pool, blocks))


def test_idle_blocks_are_evicted_least_recently_used_first_and_tails_before_heads(
    pool: BlockPool, evicted: list[int]
) -> None:
    older, newer = pool.allocate(2), pool.allocate(2)
    pool.keep(older + newer)
    pool.free(older)
    pool.free(newer)
    pool.allocate(2)
    assert not evicted, "free blocks go first"
    pool.allocate(3)
    assert evicted == [older[1], older[0], newer[1]]


def test_a_forgotten_block_is_free_at_once_if_idle_and_later_if_used(pool: BlockPool) -> None:
    idle, used = pool.allocate(1), pool.allocate(1)
    pool.keep(idle + used)
    pool.free(idle)
    pool.forget(idle[0])
    pool.forget(used[0])
    pool.check_integrity(references(pool, used))
    pool.free(used)
    assert pool.num_idle == 0 and pool.num_available == 6


def test_the_integrity_check_sees_a_lost_reference_and_a_double_free(pool: BlockPool) -> None:
    blocks = pool.allocate(1)
    with pytest.raises(AssertionError, match="reference counts"):
        pool.check_integrity(references(pool))
    pool.free(blocks)
    with pytest.raises(AssertionError, match="freed twice"):
        pool.free(blocks)
