"""A Redis user with the rights that deploy/README.md lists, and no others, is enough; one is told what it lacks."""

import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import redis
import redis.asyncio
from redis.exceptions import NoPermissionError

from producer import Client, RedisUnavailableError
from producer.redis_failures import explain
from tests.fakes.waiting import wait_until
from tests.fakes.worker_runs import WorkerThread
from tests.unit.worker.test_held_jobs import make_claim, make_job
from worker.commit import Committer
from worker.embedded_redis import EmbeddedRedis
from worker.errors import StartRefusedError
from worker.finishing import Finisher
from worker.redis_client import check_server
from worker.running_job import RunningJob

README = Path(__file__).parents[2] / "deploy" / "README.md"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EmbeddedRedis]:
    """One of its own: its default user loses its rights."""
    with EmbeddedRedis(data_dir=tmp_path, fsync="always") as server:
        yield server


def rights() -> list[str]:
    found = re.search(r"^ *ACL SETUSER promptmill on >PASSWORD (.*)$", README.read_text(), re.MULTILINE)
    assert found is not None
    return found[1].split()


def test_the_listed_rights_are_enough_for_a_worker_and_its_clients(server: EmbeddedRedis) -> None:
    with redis.Redis.from_url(server.url) as admin:
        admin.execute_command("ACL", "SETUSER", "promptmill", "on", ">secret", *rights())
        admin.execute_command("ACL", "LOG", "RESET")
        url = server.url.replace("://", "://promptmill:secret@")
        with redis.Redis.from_url(url) as connection:
            check_server(connection, url)
        with WorkerThread(url), Client(url) as client:
            first = client.submit("a", max_tokens=2, durable=True, tenant="acme")
            then = client.submit("b", max_tokens=2, depends_on=[first], idempotency_key="once")
            assert [client.result(job.id, timeout=60).status for job in (first, then)] == ["finished"] * 2
            assert client.workers() and client.queues() and not client.failed() and not client.cancel(first)
        assert admin.execute_command("ACL", "LOG") == [], "what was refused"


def test_a_right_that_is_missing_is_told_from_a_redis_that_is_away(server: EmbeddedRedis) -> None:
    with redis.Redis.from_url(server.url) as admin:
        admin.execute_command("ACL", "SETUSER", "promptmill", "on", ">secret", *rights(), "-info", "-eval", "-evalsha")
    url = server.url.replace("://", "://promptmill:secret@")
    with (
        redis.Redis.from_url(url) as connection,
        pytest.raises(StartRefusedError, match=r"deploy/README\.md") as refused,
    ):
        check_server(connection, url)
    assert "start it" not in str(refused.value)
    with Client(url) as client, pytest.raises(RedisUnavailableError, match=r"deploy/README\.md") as unavailable:
        client.submit("a")
    assert "password" not in str(unavailable.value)


async def test_a_refusal_is_told_without_the_command_that_redis_py_quotes(server: EmbeddedRedis) -> None:
    """What is written may be a prompt, or an endpoint's secret."""
    with redis.Redis.from_url(server.url) as admin:
        admin.execute_command("ACL", "SETUSER", "promptmill", "on", ">secret", *rights(), "-hset")
    url = server.url.replace("://", "://promptmill:secret@")
    with redis.Redis.from_url(url) as connection, pytest.raises(NoPermissionError) as refused:
        connection.pipeline(transaction=False).hset("promptmill:x", "field", "a prompt").execute()
    async with redis.asyncio.Redis.from_url(url) as client:
        with pytest.raises(NoPermissionError) as refused_async:
            pipe = client.pipeline(transaction=False)
            pipe.hset("promptmill:x", "field", "a prompt")
            await pipe.execute()
    for error in (refused.value, refused_async.value):
        assert "a prompt" in str(error)
        said = explain(error, url)
        assert re.search(r"refuses us: User promptmill has no permissions to run the 'hset' command; give", said), said


@pytest.fixture
def blind(server: EmbeddedRedis) -> Iterator[redis.Redis]:
    """A worker's connection that has lost the right to read who holds its jobs."""
    with redis.Redis.from_url(server.url) as admin:
        admin.execute_command("ACL", "SETUSER", "promptmill", "on", ">secret", *rights(), "-mget")
    with redis.Redis.from_url(server.url.replace("://", "://promptmill:secret@")) as connection:
        yield connection


def ended_job() -> RunningJob:
    job = make_job(make_claim())
    job.rq_job = SimpleNamespace(webhooks=[])
    job.end()
    return job


def test_who_may_not_read_whose_a_job_is_takes_it_for_no_other_attempts(blind: redis.Redis) -> None:
    lost: list[RunningJob] = []
    parts = cast(Any, SimpleNamespace(client=blind, outlet=None, intake=None, store=None))
    finisher = Finisher(parts, cast(Any, None), post=lambda call: None, on_lost=lost.append, on_end=lost.append)
    finisher.add(ended_job())
    with pytest.raises(NoPermissionError, match="mget"):
        finisher.decide()
    assert not lost and finisher.has_work


def test_a_commit_that_may_not_read_whose_its_job_is_says_so(
    blind: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.commit.FAILED_COMMIT_SECONDS", ())
    over: list[RunningJob] = []
    committer = Committer(blind, cast(Any, None), over.append, on_lost=over.append)
    job = ended_job()
    job.decide("cancelled")
    committer.commit([job])
    wait_until(lambda: over)
    committer.close(5.0)
    assert job.error is not None and "NoPermissionError" in job.error.message and "mget" in job.error.message
