import numpy as np

from engine.kv_cache.prefix_index import PrefixIndex


def digests(tokens: list[int], *, block_size: int = 2, cache_key: str = "") -> list[bytes]:
    return PrefixIndex.chain(PrefixIndex.root(cache_key), np.array(tokens, np.int32), block_size)


def test_equal_prefixes_have_equal_digests_and_a_chain_may_be_continued() -> None:
    whole = digests([1, 2, 3, 4, 5, 6])
    assert whole[:2] == digests([1, 2, 3, 4])
    assert whole[2:] == PrefixIndex.chain(whole[1], np.array([5, 6], np.int32), 2)


def test_a_digest_depends_on_every_token_before_it_and_on_the_cache_key() -> None:
    assert digests([1, 2, 3, 4])[1] != digests([9, 2, 3, 4])[1]
    assert digests([1, 2])[0] != digests([1, 2], cache_key="an adapter")[0]
    assert len(set(digests([7, 7, 7, 7, 7, 7]))) == 3


def test_an_incomplete_block_has_no_digest() -> None:
    assert len(digests([1, 2, 3])) == 1 and digests([1]) == []


def test_the_longest_known_run_is_found_and_the_first_block_of_a_prefix_stays() -> None:
    index = PrefixIndex()
    first, second, third = digests([1, 2, 3, 4, 5, 6])
    assert index.add([first, third], [10, 12]) == [10, 12]
    assert index.add([first], [20]) == []
    assert index.find_all([first, second, third]) == [10]
    assert index.add([first, second], [20, 11]) == [11]
    assert index.find_all([first, second, third]) == [10, 11, 12]
    assert 11 in index and 20 not in index
    index.remove([11])
    assert index.find_all([first, second, third]) == [10] and len(index) == 2
    index.check_integrity()


def test_a_cache_key_may_be_any_text() -> None:
    assert digests([1, 2], cache_key="\ud800") != digests([1, 2], cache_key="\ud801")
