"""Streams that are silent are looked at, the more rarely the more of them a client follows."""

from producer.contract import EntryId
from producer.operations import Protocol, Receive, Send, Subscribe
from producer.subscription import LOOK_SECONDS, LOOKS_A_SECOND, LookPace, follow


def begin(number: int, pace: LookPace) -> Protocol[None]:
    """A stream of a job that waits, up to its first wait for a message."""
    stream = follow(f"job-{number}", after=EntryId(0, 0), timeout=None, pace=pace)
    assert isinstance(next(stream), Subscribe)
    return stream


def next_wait(stream: Protocol[None]) -> float:
    """Seconds, behind a look at a job that still waits."""
    operation = stream.send(None)
    assert isinstance(operation, Send)
    operation = stream.send([[b"queued", b"promptmill"], 0, None, []])
    assert isinstance(operation, Receive)
    return operation.timeout


def test_a_thousand_streams_are_looked_at_no_more_than_so_often_a_second() -> None:
    pace = LookPace()
    streams = [begin(number, pace) for number in range(1000)]
    assert [next_wait(stream) for stream in streams] == [1000 / LOOKS_A_SECOND] * 1000
    for stream in streams[1:]:
        stream.close()
    assert next_wait(streams[0]) == LOOK_SECONDS
