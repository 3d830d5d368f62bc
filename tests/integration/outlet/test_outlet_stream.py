"""The stream outlet against a real Redis: what is stored, what is published, and what failures leave."""

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from producer.contract import Choice, EntryId, Marker
from producer.contract.keys import STREAM_TTL_SECONDS, fence_key
from tests.fakes.flaky_redis import FlakyRedis
from tests.fakes.outlet_streams import JOB, KEY, finished, join, open_stream, put, stored
from tests.fakes.redis_reads import stream_rows
from worker.outlet.stream import StreamOutlet
from worker.scripts import Scripts


def test_marker_comes_first_and_done_last_with_contiguous_ids(client: FlakyRedis, outlet: StreamOutlet) -> None:
    stream = open_stream(outlet)
    put(stream, "Hel", 1)
    outlet.flush(0.0)
    put(stream, "lo", 2, 3, offset=1, end="stop")
    stream.seal(finished(stream))
    outlet.flush(1.0)
    entries = stored(client)
    assert [(entry_id, field) for entry_id, field, _ in entries] == [
        ("1-0", "m"),
        ("1-1", "d"),
        ("1-2", "d"),
        ("1-3", "d"),
    ]
    choices, done = join(entries)
    assert choices == stream.choices() == [Choice(index=0, text="Hello", token_ids=[1, 2, 3], finish_reason="stop")]
    assert done is not None and done.usage.total_tokens == 6
    assert stream.is_stored


def test_stream_has_a_ttl_only_from_its_done_entry_on(client: FlakyRedis, outlet: StreamOutlet) -> None:
    stream = open_stream(outlet)
    put(stream, "a", 1, end="length")
    outlet.flush(0.0)
    assert client.ttl(KEY) == -1
    stream.seal(finished(stream))
    outlet.flush(1.0)
    assert 0 < client.ttl(KEY) <= STREAM_TTL_SECONDS


def test_next_attempt_makes_an_ended_stream_live_again(client: FlakyRedis, outlet: StreamOutlet) -> None:
    first = open_stream(outlet)
    put(first, "old", 9, end="stop")
    first.seal(finished(first))
    outlet.flush(0.0)
    second = open_stream(outlet, attempt=2)
    outlet.flush(1.0)
    assert client.ttl(KEY) == -1
    put(second, "new", 1, end="stop")
    second.seal(finished(second))
    outlet.flush(2.0)
    choices, done = join(stored(client))
    assert choices == second.choices() and choices[0].text == "new"
    assert done is not None


@pytest.mark.parametrize("publish", [True, False])
def test_data_entries_are_published_with_their_ids_and_markers_are_not(
    client: FlakyRedis, outlet: StreamOutlet, redis_client: redis.Redis, publish: bool
) -> None:
    with redis_client.pubsub() as subscriber:
        subscriber.subscribe(KEY)
        assert subscriber.get_message(timeout=10)["type"] == "subscribe"
        stream = open_stream(outlet, publish=publish)
        put(stream, "a", 1, end="stop")
        stream.seal(finished(stream))
        outlet.flush(0.0)
        expected = [f"{entry_id} {data}" for entry_id, field, data in stored(client) if field == "d"]
        assert len(expected) == 2
        redis_client.publish(KEY, "end")
        seen = []
        while (message := subscriber.get_message(timeout=10)["data"].decode()) != "end":
            seen.append(message)
        assert seen == (expected if publish else [])


def test_a_lost_reply_neither_repeats_nor_loses_entries(client: FlakyRedis, outlet: StreamOutlet) -> None:
    stream = open_stream(outlet)
    put(stream, "a", 1)
    client.lost_replies = 1
    assert outlet.flush(0.0) == []
    assert outlet.is_redis_away
    put(stream, "b", 2, offset=1, end="stop")
    stream.seal(finished(stream))
    assert outlet.flush(10.0) == []
    assert not outlet.is_redis_away
    assert [entry_id for entry_id, _, _ in stored(client)] == ["1-0", "1-1", "1-2", "1-3"]
    assert join(stored(client))[0] == stream.choices()
    assert stream.is_stored


def test_output_waits_while_redis_is_away_and_shares_one_entry_then(client: FlakyRedis, outlet: StreamOutlet) -> None:
    stream = open_stream(outlet)
    client.lost_requests = 1
    outlet.flush(0.0)
    for offset in range(50):
        put(stream, "x", offset, offset=offset)
        outlet.flush(0.01)  # backs off: nothing is tried
    assert client.num_pipelines == 1
    outlet.flush(10.0)
    assert [entry_id for entry_id, _, _ in stored(client)] == ["1-0", "1-1"]


@pytest.mark.parametrize("num_lost", [1, 2])
@pytest.mark.parametrize("attempt", [1, 2])
def test_entries_that_redis_lost_are_sent_again(
    client: FlakyRedis, outlet: StreamOutlet, attempt: int, num_lost: int
) -> None:
    for number in range(1, attempt + 1):
        stream = open_stream(outlet, attempt=number)
        outlet.flush(0.0)
    for offset, text in enumerate("abc"):
        put(stream, text, offset, offset=offset)
        outlet.flush(float(offset))
    kept = stream_rows(client, KEY)[:-num_lost]
    client.delete(KEY)
    for entry_id, fields in kept:  # what a replica that lagged behind would hold
        client.xadd(KEY, dict(fields.items()), id=entry_id)
    put(stream, "d", 3, offset=3, end="stop")
    stream.seal(finished(stream))
    assert outlet.flush(10.0) == []
    entry_ids = [entry_id for entry_id, _, _ in stored(client)]
    assert entry_ids[attempt - 1 :] == [f"{attempt}-{seq}" for seq in range(6)]
    assert join(stored(client))[0] == stream.choices()


def test_a_stream_that_redis_lost_is_sent_again_from_its_marker(client: FlakyRedis, outlet: StreamOutlet) -> None:
    stream = open_stream(outlet)
    put(stream, "a", 1)
    outlet.flush(0.0)
    client.flushall()  # the script is gone, too
    put(stream, "b", 2, offset=1, end="stop")
    stream.seal(finished(stream))
    assert outlet.flush(1.0) == []
    assert [entry_id for entry_id, _, _ in stored(client)] == ["1-0", "1-1", "1-2", "1-3"]
    assert join(stored(client))[0] == stream.choices()


def test_an_older_attempt_is_fenced_out_by_the_marker_of_a_newer_one(client: FlakyRedis, outlet: StreamOutlet) -> None:
    zombie = open_stream(outlet)
    put(zombie, "a", 1)
    outlet.flush(0.0)
    newer = StreamOutlet(client, Scripts())
    heir = open_stream(newer, attempt=2)
    newer.flush(0.0)
    put(zombie, "late", 2, offset=1)
    assert outlet.flush(1.0) == [JOB]
    put(heir, "b", 5, end="stop")
    heir.seal(finished(heir))
    newer.flush(1.0)
    assert "late" not in "".join(data for _, _, data in stored(client))
    assert join(stored(client))[0] == heir.choices()
    assert outlet.seconds_until_due(2.0) is None  # the zombie is forgotten


def test_of_two_attempts_of_one_number_only_the_one_that_holds_the_job_writes(
    client: FlakyRedis, outlet: StreamOutlet
) -> None:
    """A fail-over lost the claim of the first, and what it had written: its number is given once more."""
    client.set(fence_key(JOB), "1:first")
    zombie = open_stream(outlet, fence="1:first")
    for offset in range(3):
        put(zombie, "a", 1, offset=offset)
        outlet.flush(float(offset))
    client.delete(KEY)
    client.set(fence_key(JOB), "1:second")
    newer = StreamOutlet(client, Scripts())
    heir = open_stream(newer, fence="1:second")
    newer.flush(0.0)
    put(heir, "bb", 1, 1)
    newer.flush(1.0)
    put(zombie, "a", 1, offset=3)
    assert outlet.flush(10.0) == [JOB]
    put(heir, "b", 1, offset=2, end="stop")
    heir.seal(finished(heir))
    assert newer.flush(10.0) == []
    assert join(stored(client))[0] == heir.choices()


def test_a_marker_older_than_the_stream_is_fenced_out_at_once(client: FlakyRedis, outlet: StreamOutlet) -> None:
    open_stream(StreamOutlet(client, Scripts()), attempt=1)
    client.xadd(KEY, {"m": Marker(job_id=JOB, attempt=5, worker="other").to_wire()}, id="5-0")
    open_stream(outlet, attempt=4)
    assert outlet.flush(0.0) == [JOB]


def test_a_key_of_another_kind_gives_up_its_job_alone(client: FlakyRedis, outlet: StreamOutlet) -> None:
    client.set(KEY, "not a stream")
    open_stream(outlet)
    neighbour = open_stream(outlet, job_id="job-2")
    put(neighbour, "fine", 1, end="stop")
    neighbour.seal(finished(neighbour))
    assert outlet.flush(0.0) == [JOB]
    assert neighbour.is_stored


def test_out_of_memory_counts_as_redis_away(client: FlakyRedis, outlet: StreamOutlet) -> None:
    stream = open_stream(outlet)
    put(stream, "a", 1, end="stop")
    stream.seal(finished(stream))
    client.config_set("maxmemory", "1")
    try:
        assert outlet.flush(0.0) == []
        assert outlet.is_redis_away
    finally:
        client.config_set("maxmemory", "0")
    assert outlet.flush(10.0) == []
    assert stream.is_stored


STEP = st.tuples(
    st.integers(0, 2),  # the choice
    st.text(st.characters(codec="utf-8"), max_size=6),
    st.lists(st.integers(0, 200_000), max_size=3),
    st.sampled_from(["nothing", "flush", "flush", "lost request", "lost reply", "lost stream"]),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(STEP, max_size=25), attempt=st.integers(1, 3))
def test_joined_entries_equal_the_result_whatever_fails(
    client: FlakyRedis, steps: list[tuple[int, str, list[int], str]], attempt: int
) -> None:
    client.flushall()
    outlet = StreamOutlet(client, Scripts())
    for old in range(1, attempt):
        put(open_stream(outlet, attempt=old, num_choices=3), "void", 1)
        outlet.flush(float(old), force=True)
    stream = open_stream(outlet, attempt=attempt, num_choices=3)
    counts = [0, 0, 0]
    for number, (index, text, token_ids, event) in enumerate(steps):
        put(stream, text, *token_ids, index=index, offset=counts[index])
        counts[index] += len(token_ids)
        client.lost_requests = int(event == "lost request")
        client.lost_replies = int(event == "lost reply")
        if event == "lost stream":
            client.delete(KEY)
        if event != "nothing":
            assert outlet.flush(1000.0 + number, force=True) == []
    stream.end_choices("length")
    stream.seal(finished(stream))
    client.lost_requests = client.lost_replies = 0
    assert outlet.flush(5000.0, force=True) == []
    assert stream.is_stored
    entries = stored(client)
    choices, done = join(entries)
    assert choices == stream.choices()
    assert done == finished(stream)
    mine = [EntryId.parse(entry_id) for entry_id, _, _ in entries if entry_id.startswith(f"{attempt}-")]
    assert mine == [EntryId(attempt, seq) for seq in range(len(mine))]
