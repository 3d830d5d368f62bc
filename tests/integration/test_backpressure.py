"""Nobody takes more than there is room for, and nobody who reads slowly holds up anybody else."""

import socket

import redis

from producer import Client
from producer.contract import keys
from tests.fakes.waiting import wait_until
from tests.fakes.worker_runs import WorkerThread, enqueue_many, rq_queue, wait_for_no_leftovers


def num_leases(connection: redis.Redis) -> int:
    return int(connection.zcard(keys.leases_key(keys.DEFAULT_QUEUE)))


def test_a_worker_leases_what_its_engine_has_room_for_and_a_few_more(
    redis_url: str, redis_client: redis.Redis, client: Client
) -> None:
    enqueue_many(rq_queue(redis_client), 100, max_tokens=3)
    with WorkerThread(redis_url, max_num_seqs=16) as worker:
        worker.engine.pause()
        wait_until(lambda: [info.num_running for info in client.workers()] == [20])  # a beat later
        assert num_leases(redis_client) == 20 and len(worker.engine.submitted) == 20
        worker.engine.go_on()
        wait_until(lambda: rq_queue(redis_client).count == 0)
        wait_for_no_leftovers(redis_client)


def test_a_job_of_many_choices_takes_as_much_room(redis_url: str, redis_client: redis.Redis) -> None:
    """A claim cannot know how many choices a job asks for, but the next one does."""
    enqueue_many(rq_queue(redis_client), 60, max_tokens=3, n=10)
    with WorkerThread(redis_url, max_num_seqs=16) as worker:
        worker.engine.pause()
        wait_until(lambda: num_leases(redis_client) > 0 and len(worker.engine.running) == num_leases(redis_client))
        assert num_leases(redis_client) <= 20
        worker.engine.go_on()
        wait_until(lambda: rq_queue(redis_client).count == 0)
        wait_for_no_leftovers(redis_client)


def test_jobs_whose_commit_is_slow_take_no_room_for_ever(redis_url: str, redis_client: redis.Redis) -> None:
    """`max_num_jobs` bounds what a worker holds, whatever its engine has room for."""
    enqueue_many(rq_queue(redis_client), 50, max_tokens=3)
    with WorkerThread(redis_url, max_num_seqs=16, max_num_jobs=5) as worker:
        worker.engine.pause()
        wait_until(lambda: len(worker.engine.running) == 5)
        assert num_leases(redis_client) == 5
        worker.engine.go_on()
        wait_until(lambda: rq_queue(redis_client).count == 0)


def test_a_subscriber_that_never_reads_slows_nobody(redis_url: str, redis_client: redis.Redis, client: Client) -> None:
    job = client.submit("Long", max_tokens=4000, n=4, job_id="long")
    port = redis_client.connection_pool.connection_kwargs["port"]
    with socket.create_connection(("127.0.0.1", port)) as stuck:
        stuck.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stuck.sendall(f"SUBSCRIBE {keys.stream_key(job.id)}\r\n".encode())
        wait_until(lambda: redis_client.pubsub_numsub(keys.stream_key(job.id))[0][1] == 1)
        with WorkerThread(redis_url):
            chunks = iter(job.stream(timeout=30))
            next(chunks)
            other = client.submit("Short", max_tokens=3)
            assert other.result(timeout=20).status == "finished"
            text = "".join(chunk.text for chunk in chunks if chunk.index == 0)
            result = job.result(timeout=60)
        assert result.text.endswith(text) and len(result.choices[3].token_ids) == 4000


def test_subscribers_that_are_gone_leave_nothing_behind(
    redis_url: str, redis_client: redis.Redis, client: Client
) -> None:
    with WorkerThread(redis_url) as worker:
        worker.engine.pause()
        job = client.submit("Hello", max_tokens=50)
        with job.stream(timeout=20) as chunks:
            worker.engine.go_on()
            next(iter(chunks))
        assert job.result(timeout=20).status == "finished"
        wait_until(lambda: redis_client.pubsub_numsub(keys.stream_key(job.id))[0][1] == 0)
