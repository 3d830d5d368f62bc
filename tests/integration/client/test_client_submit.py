"""Submitting through the client, held against RQ's own view of the queue."""

import threading

import pytest
import redis
from rq import Queue
from rq.job import Job as RqJob
from rq.job import JobStatus as RqStatus
from rq.registry import CanceledJobRegistry
from rq.serializers import JSONSerializer

from producer import Client, InvalidJobError, JobRequest, RedisUnavailableError, SettingsError
from producer.contract import keys
from tests.fakes.fake_worker import FakeWorker


def test_a_submitted_job_is_a_plain_rq_job(redis_url: str, redis_client: redis.Redis, queue: Queue) -> None:
    with Client(redis_url) as client:
        job = client.submit("Name three rivers.", max_tokens=64, temperature=0.0)
    assert queue.job_ids == [job.id]
    assert queue in Queue.all(connection=redis_client)
    found = RqJob.fetch(job.id, connection=redis_client, serializer=JSONSerializer)
    assert found.get_status() is RqStatus.QUEUED
    assert found.func_name == "promptmill.generate"
    assert found.kwargs == {"v": 1, "prompt": "Name three rivers.", "max_tokens": 64, "temperature": 0.0}
    assert (found.args, found.timeout, found.result_ttl, found.failure_ttl) == ([], -1, 86400, 86400)
    assert found.origin == "promptmill"
    assert found.enqueued_at is not None
    assert found.description == "promptmill.generate(prompt='Name three rivers.')"


def test_messages_travel_without_their_defaults(redis_url: str, queue: Queue) -> None:
    with Client(redis_url) as client:
        client.submit(messages=[{"role": "user", "content": "Hello"}], stop="END")
    [found] = queue.jobs
    assert found.kwargs == {"v": 1, "messages": [{"role": "user", "content": "Hello"}], "stop": ["END"]}
    assert found.description == "promptmill.generate(messages='Hello')"


def test_many_jobs_keep_their_order_and_go_in_batches(redis_url: str, queue: Queue) -> None:
    with Client(redis_url) as client:
        jobs = client.submit_many([{"prompt": f"prompt {i}"} for i in range(1201)])
    assert queue.job_ids == [job.id for job in jobs]
    assert queue.jobs[1200].kwargs["prompt"] == "prompt 1200"


def test_one_bad_item_of_many_is_named_and_nothing_is_enqueued(redis_url: str, queue: Queue) -> None:
    with (
        Client(redis_url) as client,
        pytest.raises(InvalidJobError, match=r"requests\[2\]: temperature: must be at") as e,
    ):
        client.submit_many([{"prompt": "a"}, JobRequest(prompt="b"), {"prompt": "c", "temperature": 3}])
    assert (e.value.index, e.value.param) == (2, "requests[2].temperature")
    assert queue.count == 0


@pytest.mark.parametrize(
    ("misplaced", "remedy"),
    [
        ({"priority_class": "high"}, "give submit_many priority_class="),
        ({"job_id": "one"}, "give submit_many job_ids="),
        ({"depends_on": ["one"]}, "with submit"),
    ],
)
def test_what_is_no_part_of_a_request_is_told_its_place(
    redis_url: str, misplaced: dict[str, object], remedy: str
) -> None:
    with Client(redis_url) as client, pytest.raises(InvalidJobError, match=remedy) as caught:
        client.submit_many([{"prompt": "a"}, {"prompt": "b", **misplaced}])
    assert caught.value.param == f"requests[1].{next(iter(misplaced))}"


def test_priority_classes_are_queues_of_their_own(redis_url: str, redis_client: redis.Redis) -> None:
    with Client(redis_url, queue="mine") as client:
        high = client.submit("a", priority_class="high")
        low = client.submit("b", priority_class="low")
        other = client.submit("c", queue="other")
        with pytest.raises(InvalidJobError, match="priority_class: must be 'high' or 'low'"):
            client.submit("d", priority_class="urgent")  # type: ignore[arg-type]
        with pytest.raises(InvalidJobError, match="queue: must match"):
            client.submit("d", queue="not a name")
        client.submit("d", tenant="acme")
    assert redis_client.zrange(keys.turns_key("mine"), 0, -1) == [b"mine@acme"]
    assert (high.queue, low.queue, other.queue) == ("mine:high", "mine:low", "other")
    assert redis_client.lrange("rq:queue:mine:high", 0, -1) == [high.id.encode()]


def test_an_id_of_ones_own_is_enqueued_once(redis_url: str, queue: Queue) -> None:
    with Client(redis_url) as client:
        client.submit("a", job_id="my-job")
        client.submit("a", job_id="my-job")
        with pytest.raises(InvalidJobError, match="job_id: must match"):
            client.submit("a", job_id="no spaces")
        with pytest.raises(InvalidJobError, match="job_ids: must be 2 different ids"):
            client.submit_many([{"prompt": "a"}, {"prompt": "b"}], job_ids=["x", "x"])
    assert queue.job_ids == ["my-job"]


def test_a_lost_reply_does_not_enqueue_twice(redis_url: str, queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    with Client(redis_url) as client:
        client.workers()  # so that the connection is there before replies get lost
        pool = client._transport._redis.connection_pool
        lost = threading.Event()
        connection_class = pool.connection_class
        read = connection_class.read_response

        def lose_one(self: redis.Connection, *args: object, **kwargs: object) -> object:
            reply = read(self, *args, **kwargs)
            if not lost.is_set():
                lost.set()
                raise redis.ConnectionError("the reply was lost")
            return reply

        monkeypatch.setattr(connection_class, "read_response", lose_one)
        job = client.submit("once")
    assert lost.is_set()
    assert queue.job_ids == [job.id]


@pytest.mark.parametrize(
    ("arguments", "fields", "param"),
    [
        ((), {}, "prompt"),
        (("a",), {"messages": [{"role": "user", "content": "b"}]}, "prompt"),
        (("a",), {"prompt": "b"}, "prompt"),
        (("",), {}, "prompt"),
        (("a",), {"temperature": 3}, "temperature"),
        (("a",), {"max_tokens": 0}, "max_tokens"),
        (("a",), {"temprature": 1}, "temprature"),
        (("a",), {"metadata": {"x": object()}}, "metadata"),
        ((), {"messages": [{"role": "boss", "content": "b"}]}, "messages[0].role"),
    ],
)
def test_a_request_that_breaks_the_contract_is_refused_by_name(
    redis_url: str, queue: Queue, arguments: tuple[str, ...], fields: dict[str, object], param: str
) -> None:
    with Client(redis_url) as client, pytest.raises(InvalidJobError) as error:
        client.submit(*arguments, **fields)  # type: ignore[arg-type]
    assert error.value.param == param
    assert queue.count == 0


def test_a_model_goes_to_the_queue_of_a_worker_that_serves_it(redis_url: str) -> None:
    worker = FakeWorker(redis_url, queue="big", name="one")
    dead = FakeWorker(redis_url, queue="gone", name="two")
    with Client(redis_url) as client:
        assert client.submit("a", model="big-model").queue == "promptmill"  # nobody is alive: the worker checks
        worker.announce("big-model", "alias")
        dead.announce("old-model", seconds=-1)
        assert client.submit("a", model="alias").queue == "big"
        assert client.submit("a", model="alias", priority_class="high").queue == "big:high"
        assert client.submit("a", model="alias", queue="big:low").queue == "big:low"
        with pytest.raises(
            InvalidJobError, match="no live worker serves 'old-model'; served are: alias, big-model"
        ) as e:
            client.submit("a", model="old-model")
        assert e.value.param == "model"
        assert [info.name for info in client.workers()] == ["one"]
        [big, *_] = [status for status in client.queues() if status.name == "big"]
        assert (big.depth, big.registries["started"]) == (1, 0)
    worker.close()
    dead.close()


def test_redis_out_of_reach_is_named_without_its_password() -> None:
    with (
        Client("redis://user:secret@127.0.0.1:1/0") as client,
        pytest.raises(RedisUnavailableError, match=r"redis://user:\*\*\*@127\.0\.0\.1:1/0 cannot be reached") as error,
    ):
        client.submit("a")
    assert "secret" not in str(error.value)
    assert "--redis-url" in str(error.value)


def test_a_redis_url_that_is_none_is_a_settings_error() -> None:
    with pytest.raises(SettingsError, match=r"--redis-url \(PROMPTMILL_REDIS_URL\)"):
        Client("http://localhost")
    with pytest.raises(SettingsError, match="--redis-url"):
        Client("redis://localhost:no-port")


def test_a_wrong_password_names_the_remedy(redis_url: str, redis_client: redis.Redis) -> None:
    host = redis_url.removeprefix("redis://")
    with (
        Client(f"redis://nobody:wrong@{host}") as client,
        pytest.raises(RedisUnavailableError, match="check user and password"),
    ):
        client.submit("a")


def test_a_cancelled_job_is_in_rqs_registry(redis_url: str, queue: Queue) -> None:
    with Client(redis_url) as client:
        job = client.submit("a")
        assert job.cancel()
    assert queue.count == 0
    assert CanceledJobRegistry(queue=queue).get_job_ids() == [job.id]
