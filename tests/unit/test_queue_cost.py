"""What the queue costs: when a slice read elsewhere is over, and what ends a run."""

import pytest

from benchmarks.queue_cost import check
from benchmarks.queue_ways import ROLES, Slice, wait_for_ends
from benchmarks.workload import Workload

DONE = b'{"v":1,"job_id":"a","done":true,"status":"finished"}'
RESULTS_LINE = b'{"v":1,"choices":[],"timings":{"total":1.0}}'


class CutMessages:
    """A socket on which messages arrive in pieces of one size, and then no more."""

    def __init__(self, messages: bytes, size: int) -> None:
        self._pieces = [messages[at : at + size] for at in range(0, len(messages), size)]

    def recv(self, num_bytes: int) -> bytes:
        return self._pieces.pop(0) if self._pieces else b""


@pytest.mark.parametrize("size", [1, 7, 64, 10_000])
def test_the_ends_of_jobs_are_counted_however_their_messages_are_cut(size: int) -> None:
    reader = CutMessages((DONE + b"chunk" * 20 + RESULTS_LINE) * 2, size)
    wait_for_ends(reader, 2)  # type: ignore[arg-type]
    with pytest.raises(SystemExit, match="closed"):
        wait_for_ends(CutMessages(DONE + DONE + RESULTS_LINE, size), 2)  # type: ignore[arg-type]


def slice_of(*token_ids: list[int]) -> Slice:
    return Slice(1.0, dict.fromkeys(ROLES, 0.5), list(token_ids))


def test_a_token_that_the_queue_changed_or_lost_ends_the_run() -> None:
    work = Workload([[1], [2]], [2, 1])
    check([slice_of([5, 6], [7]), slice_of([5, 6], [7])], work)
    with pytest.raises(SystemExit, match="changed an output"):
        check([slice_of([5, 6], [7]), slice_of([5, 6], [8])], work)
    with pytest.raises(SystemExit, match="ended early"):
        check([slice_of([5], [7]), slice_of([5], [7])], work)
