"""The ways that a benchmark compares give the same tokens for the same work."""

from benchmarks.queue_ways import open_ways
from benchmarks.workload import uniform_workload


def test_every_way_gives_the_tokens_of_the_engine_alone() -> None:
    work = uniform_workload(4, (8, 16), (4, 8), seed=0)
    with open_ways("smollm2-135m") as ways:
        slices = [way.measure(work) for way in ways.contenders.values()]
    assert [len(token_ids) for token_ids in slices[0].token_ids] == work.max_tokens
    assert all(slice_.token_ids == slices[0].token_ids for slice_ in slices) and len(slices) == 3
