"""A client, the command line and a worker with a fake engine on a real Redis, and its queue as RQ sees it."""

from collections.abc import Iterator
from functools import partial

import pytest
import redis
from rq import Queue

from producer import Client
from tests.fakes.command_line import Invoke, invoke
from tests.fakes.worker_runs import WorkerThread, rq_queue
from worker.scripts import Scripts

PATIENCE_SECONDS = 10.0


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """However busy the machine is, a worker on a thread leaves nobody behind who writes into the next test's Redis, and
    an engine's figures are those of now."""
    monkeypatch.setattr("worker.service.THREADS_END_SECONDS", PATIENCE_SECONDS)
    monkeypatch.setattr("engine.supervisor._STATS_SECONDS", PATIENCE_SECONDS)


@pytest.fixture
def queue(redis_client: redis.Redis) -> Queue:
    return rq_queue(redis_client)


@pytest.fixture
def worker_thread(redis_url: str) -> Iterator[WorkerThread]:
    with WorkerThread(redis_url) as worker_thread:
        yield worker_thread


@pytest.fixture
def client(redis_url: str) -> Iterator[Client]:
    with Client(redis_url) as client:
        yield client


@pytest.fixture
def promptmill(redis_url: str) -> Invoke:
    """The command line on that Redis."""
    return partial(invoke, redis_url)


@pytest.fixture
def scripts(redis_client: redis.Redis) -> Scripts:
    scripts = Scripts()
    scripts.load_append(redis_client)
    return scripts


@pytest.fixture
def heir(redis_url: str) -> Iterator[WorkerThread]:
    """A worker that serves once it is entered."""
    yield WorkerThread(redis_url)
