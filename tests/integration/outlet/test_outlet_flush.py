"""What one flush of the stream outlet sends, for how many jobs, and whose failures are whose."""

from producer.contract import Chunk, parse_entry
from producer.contract.keys import stream_key
from tests.fakes.flaky_redis import FlakyRedis
from tests.fakes.outlet_streams import KEY, finished, join, open_stream, put, stored
from worker.outlet.job_stream import MAX_ENTRIES_PER_APPEND
from worker.outlet.stream import StreamOutlet
from worker.scripts import Scripts


def test_what_was_put_out_since_the_last_flush_is_one_entry(client: FlakyRedis, outlet: StreamOutlet) -> None:
    stream = open_stream(outlet)
    put(stream, "a", 1)
    outlet.flush(100.0)
    assert outlet.seconds_until_due(100.0) is None
    put(stream, "b", 2, offset=1)
    put(stream, "c", 3, offset=2)
    assert outlet.seconds_until_due(100.0) == 0.0
    outlet.flush(100.0)
    texts = [
        entry.text
        for _, field, data in stored(client)
        if field == "d" and isinstance(entry := parse_entry(data), Chunk)
    ]
    assert texts == ["a", "bc"]


def test_a_forced_flush_does_not_wait_for_a_redis_that_was_away_to_be_tried_again(
    client: FlakyRedis, outlet: StreamOutlet
) -> None:
    open_stream(outlet)
    client.lost_requests = 1
    outlet.flush(100.0)
    outlet.flush(100.001)
    assert outlet.is_redis_away and stored(client) == []
    outlet.flush(100.001, force=True)
    assert len(stored(client)) == 1 and not outlet.is_redis_away


def test_all_streams_share_one_pipeline(client: FlakyRedis, outlet: StreamOutlet) -> None:
    for number in range(20):
        put(open_stream(outlet, job_id=f"job-{number}"), "a", 1)
    outlet.flush(0.0)
    assert client.num_pipelines == 1


def test_a_redis_that_has_forgotten_the_script_is_given_it_again(client: FlakyRedis, outlet: StreamOutlet) -> None:
    stream = open_stream(outlet)
    outlet.flush(0.0)
    client.script_flush()
    put(stream, "a", 1)
    assert outlet.flush(1.0) == [] and not outlet.is_redis_away
    assert len(stored(client)) == 2


def test_a_flush_is_one_round_trip(client: FlakyRedis, outlet: StreamOutlet) -> None:
    streams = [open_stream(outlet, job_id=f"job-{number}") for number in range(20)]
    outlet.flush(0.0)
    client.config_resetstat()
    for stream in streams:
        put(stream, "a", 1)
    outlet.flush(1.0)
    calls = {name: stats["calls"] for name, stats in client.info("commandstats").items()}
    assert calls["cmdstat_evalsha"] == 1 and "cmdstat_script|exists" not in calls


def test_a_key_that_is_no_stream_costs_its_own_job_alone(client: FlakyRedis, outlet: StreamOutlet) -> None:
    client.set(stream_key("job-1"), "somebody else's")
    streams = [open_stream(outlet, job_id=f"job-{number}") for number in range(3)]
    for stream in streams:
        put(stream, "a", 1)
    assert outlet.flush(0.0) == ["job-1"]
    assert streams[1].refusal is not None and "WRONGTYPE" in streams[1].refusal
    assert all(len(stored(client, stream_key(f"job-{number}"))) == 2 for number in (0, 2))
    assert client.get(stream_key("job-1")) == b"somebody else's"


def test_a_job_that_is_given_up_is_told_of_though_redis_is_away(client: FlakyRedis, outlet: StreamOutlet) -> None:
    unwritable, other = open_stream(outlet, job_id="unwritable"), open_stream(outlet)
    put(unwritable, "half a pair: \ud800", 1)
    put(other, "a", 1)
    client.lost_requests = 1
    assert outlet.flush(0.0) == ["unwritable"] and outlet.is_redis_away
    assert outlet.flush(10.0) == [] and len(stored(client)) == 2


def test_a_job_that_was_fenced_out_costs_the_others_nothing(client: FlakyRedis, outlet: StreamOutlet) -> None:
    streams = [open_stream(outlet, job_id=f"job-{number}") for number in range(3)]
    outlet.flush(0.0)
    client.xadd(stream_key("job-1"), {"m": "{}"}, id="2-0")
    for stream in streams:
        put(stream, "a", 1)
    assert outlet.flush(1.0) == ["job-1"]
    assert [len(stored(client, stream_key(f"job-{number}"))) for number in range(3)] == [2, 2, 2]
    assert all(stream.has_stored_output for stream in (streams[0], streams[2]))


def test_many_long_streams_are_sent_in_script_runs_of_bounded_length(client: FlakyRedis, outlet: StreamOutlet) -> None:
    streams = [open_stream(outlet, job_id=f"job-{number}") for number in range(5)]
    for stream in streams:
        for offset in range(MAX_ENTRIES_PER_APPEND // 2):
            put(stream, "a", offset, offset=offset)
            stream.encode_pending()
    client.config_resetstat()
    outlet.flush(0.0)
    runs = client.info("commandstats")["cmdstat_evalsha"]["calls"]
    assert (client.num_pipelines, runs) == (1, 5)
    assert all(len(stored(client, stream_key(f"job-{number}"))) == 501 for number in range(5))


def test_a_stream_longer_than_one_append_is_sent_again_whole(client: FlakyRedis, outlet: StreamOutlet) -> None:
    stream = open_stream(outlet)
    num_tokens = 2 * MAX_ENTRIES_PER_APPEND + 5
    for offset in range(num_tokens):
        put(stream, "x", offset, offset=offset)
        stream.encode_pending()
    stream.end_choices("length")
    stream.seal(finished(stream))
    outlet.flush(0.0)
    assert stream.is_stored
    choices, done = join(stored(client))
    assert choices[0].token_ids == list(range(num_tokens)) and done is not None
    assert client.ttl(KEY) > 0


def test_jobs_that_no_longer_fit_in_memory_are_given_up_largest_first(client: FlakyRedis) -> None:
    outlet = StreamOutlet(client, Scripts(), max_unsent_bytes=2000)
    put(open_stream(outlet, job_id="small"), "x" * 100, 1)
    put(open_stream(outlet, job_id="large"), "x" * 5000, 1)
    client.lost_requests = 1
    assert outlet.flush(0.0) == ["large"]
    assert outlet.flush(10.0) == []
    assert client.exists(stream_key("small")) and not client.exists(stream_key("large"))
