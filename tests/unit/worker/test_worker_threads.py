"""The small parts that connect the worker's threads."""

import threading
from functools import partial
from queue import SimpleQueue
from types import SimpleNamespace

import pytest
import redis

from producer.contract import Result
from tests.unit.worker.test_running_job import make_job
from worker.background import BackgroundThreads
from worker.errors import ResultStoreError, StartRefusedError
from worker.event_queue import EventQueue
from worker.housekeeping import Chore, Housekeeper
from worker.redis_client import check_server, find_weakness
from worker.running_job import Stage
from worker.uploads import Uploads

WAIT_SECONDS = 30.0


def test_events_run_in_order_on_the_thread_that_runs_them() -> None:
    events, seen = EventQueue(), []

    def note(number: int) -> None:
        seen.append((number, threading.current_thread().name))

    for number in range(3):
        events.post(partial(note, number))
    events.run(0.0)
    assert seen == [(number, threading.current_thread().name) for number in range(3)]


def test_an_event_posted_by_an_event_waits_for_the_next_run() -> None:
    events, seen = EventQueue(), []
    events.post(lambda: events.post(lambda: seen.append("late")))
    events.run(0.0)
    events.run(WAIT_SECONDS)
    assert seen == ["late"]


def test_wake_ends_the_wait_of_another_thread() -> None:
    events = EventQueue()
    thread = threading.Thread(target=events.run, args=(WAIT_SECONDS,))
    thread.start()
    events.wake()
    thread.join(WAIT_SECONDS)
    assert not thread.is_alive()


def raise_an_error() -> None:
    raise ZeroDivisionError


def test_a_background_task_that_raises_hinders_no_other() -> None:
    threads, done = BackgroundThreads(1, "test"), threading.Event()
    threads.submit(raise_an_error)
    threads.submit(done.set)
    assert done.wait(WAIT_SECONDS)
    threads.stop(WAIT_SECONDS)


def test_a_background_task_that_hangs_does_not_hold_up_the_stop() -> None:
    threads, release = BackgroundThreads(2, "test"), threading.Event()
    threads.submit(lambda: assert_true(release.wait(WAIT_SECONDS)))
    threads.stop(0.0)
    release.set()


def test_a_background_task_that_is_not_due_holds_no_other_up_and_is_done_at_the_stop() -> None:
    threads, seen = BackgroundThreads(1, "test"), SimpleQueue[str]()
    threads.submit(lambda: seen.put("late"), after_seconds=3600.0)
    threads.submit(lambda: seen.put("soon"), after_seconds=0.05)
    threads.submit(lambda: seen.put("at once"))
    assert [seen.get(timeout=WAIT_SECONDS) for _ in range(2)] == ["at once", "soon"] and seen.empty()
    threads.stop(WAIT_SECONDS)
    assert seen.get(timeout=WAIT_SECONDS) == "late"


def test_background_tasks_fall_due_while_others_hang() -> None:
    """Whoever is free waits for what is due next, not only the one that was woken for it."""
    threads, release, done = BackgroundThreads(2, "test"), threading.Event(), threading.Event()
    threads.submit(lambda: assert_true(release.wait(WAIT_SECONDS)), after_seconds=0.05)
    threads.submit(done.set, after_seconds=0.1)
    assert done.wait(WAIT_SECONDS)
    release.set()
    threads.stop(WAIT_SECONDS)


def assert_true(value: bool) -> None:
    assert value


def test_a_chore_that_fails_is_tried_again_and_hinders_no_other() -> None:
    turns: SimpleQueue[str] = SimpleQueue()

    def fail(now: float) -> None:
        turns.put("failing")
        raise redis.ConnectionError("away")

    housekeeper = Housekeeper([Chore("failing", 0.0, fail), Chore("other", 0.0, lambda now: turns.put("other"))])
    housekeeper.start()
    assert [turns.get(timeout=WAIT_SECONDS) for _ in range(4)] == ["failing", "other"] * 2
    housekeeper.stop()
    housekeeper.join(WAIT_SECONDS)


class FlakyStore:
    def __init__(self, num_failures: int) -> None:
        self.num_failures = num_failures
        self.num_puts = 0

    def check(self) -> None:
        return

    def put(self, result: Result, attempt: int) -> Result:
        self.num_puts += 1
        if self.num_puts <= self.num_failures:
            raise ResultStoreError("down")
        return result.model_copy(update={"choices": [], "stored": "s3://b/k"})


@pytest.mark.parametrize(("num_failures", "stored"), [(0, "s3://b/k"), (2, "s3://b/k"), (99, None)])
def test_a_store_that_is_down_is_tried_again_and_then_left_out(
    num_failures: int, stored: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.uploads.RETRY_SECONDS", (0.0, 0.0, 0.0))
    store, done = FlakyStore(num_failures), threading.Event()
    job = make_job()
    job.end()
    job.decide("finished")
    job.result, job.stage = job.build_result(), Stage.STORING
    uploads = Uploads(store)
    uploads.put(job, done.set)
    assert done.wait(WAIT_SECONDS)
    assert job.result.stored == stored and store.num_puts == min(num_failures + 1, 4)


class FakeServer:
    """What `INFO` says."""

    def __init__(
        self, version: str = "7.2.0", policy: str = "noeviction", error: Exception | None = None, **server: str
    ) -> None:
        self._sections = {"server": {"redis_version": version, **server}, "memory": {"maxmemory_policy": policy}}
        self._error = error

    def info(self, section: str) -> dict[str, str]:
        if self._error is not None:
            raise self._error
        return self._sections[section]


@pytest.mark.parametrize(
    ("server", "reason"),
    [
        (FakeServer(version="6.0.16"), "6.2"),
        (FakeServer(policy="allkeys-lru"), "CONFIG SET maxmemory-policy noeviction"),
        (FakeServer(error=redis.ConnectionError("refused")), "--redis-url"),
        (FakeServer(error=redis.AuthenticationError("WRONGPASS")), "check user and password in --redis-url"),
        (FakeServer(error=redis.exceptions.NoPermissionError("no 'info'")), "refuses us.*rights that deploy/README.md"),
        (FakeServer(redis_mode="cluster"), "part of a cluster"),
        (FakeServer(server_mode="cluster"), "part of a cluster"),  # as Valkey calls it
    ],
)
def test_a_server_that_could_lose_jobs_is_refused_with_the_remedy(server: FakeServer, reason: str) -> None:
    with pytest.raises(StartRefusedError, match=reason) as caught:
        check_server(server, "redis://user:secret@host:1/0")  # type: ignore[arg-type]
    assert "secret" not in str(caught.value)


def test_a_good_server_is_accepted() -> None:
    check_server(FakeServer(), "redis://host")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("aof_enabled", "num_replicas", "is_weak"), [(0, 0, True), (1, 0, False), (0, 1, False), (None, None, True)]
)
def test_a_server_that_keeps_nothing_beyond_its_end_is_told_of(
    aof_enabled: int | None, num_replicas: int | None, is_weak: bool
) -> None:
    found = {"persistence": {"aof_enabled": aof_enabled}, "replication": {"connected_slaves": num_replicas}}
    weakness = find_weakness(SimpleNamespace(info=found.__getitem__))  # type: ignore[arg-type]
    assert (weakness is not None and "CONFIG SET appendonly yes" in weakness) == is_weak
