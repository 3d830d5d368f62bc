"""Workers on a fake engine, for tests: on a thread of this process, or in a process of their own."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import redis
from rq import Queue
from rq.job import Job
from rq.serializers import JSONSerializer

from producer.contract import Chunk, Done, Marker, Result, keys, parse_entry
from producer.redis_connection import close
from tests.fakes.fake_engine import FakeEngine
from tests.fakes.redis_reads import sorted_set_names, stream_rows
from tests.fakes.waiting import WAIT_SECONDS, wait_until
from worker.outlet.select import select_result_store
from worker.redis_client import connect
from worker.service import WorkerService
from worker.settings import WorkerSettings
from worker.started_process import StartedProcess

FUNCTION = keys.JOB_FUNCTION
STARTING_KEY = "test:starting"
SHORT_LEASE_SECONDS = 2.0  # the shortest that a worker takes


def wait_for_entries(client: redis.Redis, job_ids: Iterable[str], num_entries: int) -> None:
    """Until each job's stream has at least so many, its marker among them."""
    names = [keys.stream_key(job_id) for job_id in job_ids]
    wait_until(lambda: all(client.xlen(name) >= num_entries for name in names), "the streams' entries")


def rq_queue(client: redis.Redis, name: str = keys.DEFAULT_QUEUE) -> Queue:
    return Queue(name, connection=client, serializer=JSONSerializer)


def wait_for_result(client: redis.Redis, job_id: str) -> Result:
    wire = wait_until(lambda: client.get(keys.result_key(job_id)), f"the result of {job_id}")
    return Result.model_validate_json(wire)


def enqueue_many(queue: Queue, number: int, **fields: Any) -> list[str]:
    """Jobs with different prompts, in one transaction; their ids in the order of the queue."""
    data = [Queue.prepare_data(FUNCTION, kwargs={"prompt": f"Job {at}", **fields}) for at in range(number)]
    return [job.id for job in queue.enqueue_many(data)]


def stream_text(client: redis.Redis, job_id: str) -> str:
    """The text of a stream that has ended, since its last reset."""
    text = ""
    for _, fields in stream_rows(client, keys.stream_key(job_id)):
        if b"m" in fields:
            text = "" if Marker.model_validate_json(fields[b"m"]).reset else text
            continue
        entry = parse_entry(fields[b"d"])
        if isinstance(entry, Done):
            return text
        text += entry.text
    raise AssertionError(f"the stream of {job_id} has no end")


def stored_chunks(client: redis.Redis, job_id: str) -> list[Chunk]:
    """Every chunk of the stream, whatever was reset."""
    entries = [
        parse_entry(fields[b"d"]) for _, fields in stream_rows(client, keys.stream_key(job_id)) if b"d" in fields
    ]
    return [entry for entry in entries if isinstance(entry, Chunk)]


def leftovers(client: redis.Redis) -> list[str]:
    """Keys that no ended job may leave."""
    patterns = ["promptmill:leases:*", "promptmill:fence:*", "promptmill:attempt:*", "rq:execution*", "rq:wip:*"]
    return sorted(key.decode() for pattern in patterns for key in client.scan_iter(pattern))


def held_without_attempts(client: redis.Redis) -> list[str]:
    return [key for key in leftovers(client) if not key.startswith("promptmill:attempt:")]


def wait_for_no_leftovers(client: redis.Redis) -> None:
    wait_until(lambda: not leftovers(client), "the end of leases and executions")


class WorkerThread:
    """A `WorkerService` on a thread."""

    def __init__(self, redis_url: str, engine: FakeEngine | None = None, **settings: Any) -> None:
        self.settings = WorkerSettings(redis_url=redis_url, model="fake", **settings)
        self.engine = engine or FakeEngine()
        self._client = connect(redis_url)
        self.error: BaseException | None = None
        store = select_result_store(self.settings.results, s3_endpoint_url=self.settings.s3_endpoint_url)
        self.service = WorkerService(self.settings, self._client, self.engine, store)  # type: ignore[arg-type]
        self._serving = threading.Event()
        self._thread = threading.Thread(target=self._run, name="worker", daemon=True)

    @property
    def name(self) -> str:
        return self.service.name

    def __enter__(self) -> "WorkerThread":
        self.engine.start()
        self._thread.start()
        assert self._serving.wait(WAIT_SECONDS)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()
        if self.error is not None:
            raise self.error

    def stop(self) -> None:
        self.service.request_stop()
        self.join()

    def join(self) -> None:
        self._thread.join(WAIT_SECONDS)
        assert not self._thread.is_alive()
        self.engine.stop()
        close(self._client)

    def _run(self) -> None:
        try:
            self.service.run(on_serving=self._serving.set)
        except BaseException as error:
            self.error = error
            self._serving.set()


def held_jobs(running: WorkerThread, queue: Queue, num_jobs: int) -> list[Job]:
    """Jobs that run side by side and give nothing until the engine goes on."""
    running.engine.pause()
    jobs = [queue.enqueue(FUNCTION, prompt="Hello", max_tokens=5) for _ in range(num_jobs)]
    wait_until(lambda: len(running.engine.running) == num_jobs)
    return jobs


class WorkerProcess:
    """`run_worker` on a fake engine in a process, for signals."""

    def __init__(
        self,
        redis_url: str,
        *,
        step_seconds: float = 0.001,
        hold_after: int | None = None,
        stop_seconds: float | None = None,
        hanging_store: bool = False,
        hanging_start: bool = False,
        log: Path | None = None,
        **settings: Any,
    ) -> None:
        """`hold_after`: tokens behind which no answer goes on. `stop_seconds`: as a test has it that does not hold the
        worker to what is promised."""
        environment = {f"PROMPTMILL_{name.upper()}": str(value) for name, value in settings.items()}
        if hold_after is not None:
            environment["FAKE_HOLD_AFTER"] = str(hold_after)
        if stop_seconds is not None:
            environment["FAKE_STOP_SECONDS"] = str(stop_seconds)
        if hanging_store:
            environment["FAKE_HANGING_STORE"] = "1"
        if hanging_start:
            environment["FAKE_HANGING_START"] = "1"
        environment |= {"PROMPTMILL_REDIS_URL": redis_url, "FAKE_STEP_SECONDS": str(step_seconds)}
        self._client = redis.Redis.from_url(redis_url)
        with log.open("wb") if log is not None else nullcontext() as sink:
            self.process = StartedProcess(
                [sys.executable, "-m", "tests.fakes.worker_runs"], env={**os.environ, **environment}, stderr=sink
            )

    def wait_until_serving(self) -> "WorkerProcess":
        pattern = f'"pid":{self.process.pid},'

        def is_published() -> bool:
            assert self.process.poll() is None, "the worker ended"
            infos = [
                cast("bytes | None", self._client.get(keys.worker_key(name)))
                for name in sorted_set_names(self._client, keys.WORKERS_KEY)
            ]
            return any(pattern in info.decode() for info in infos if info)

        wait_until(is_published, "the worker")
        return self

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def wait(self, timeout: float = WAIT_SECONDS) -> int:
        return self.process.wait(timeout)

    def __enter__(self) -> "WorkerProcess":
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._client.close()


class HangingStore:
    """A result store that takes an upload and never answers."""

    def check(self) -> None:
        return

    def put(self, result: Result, attempt: int) -> Result:
        while True:
            time.sleep(3600)


class ForgetfulEngine(FakeEngine):
    """Remembers nothing of what it was given: nobody could ask, and what a process holds is to be measured."""

    def submit(self, *args: Any, **options: Any) -> None:
        super().submit(*args, **options)
        self.submitted.clear()
        self.requests.clear()
        self.num_resumed_tokens.clear()


def main() -> None:
    """Run a worker whose engine is the fake; what else is fake, the environment says."""
    import logging

    import worker.run
    import worker.stop_signals

    logging.basicConfig(level="INFO")
    engine = ForgetfulEngine(step_seconds=float(os.environ["FAKE_STEP_SECONDS"]))
    worker.run.InferenceEngine = lambda config: engine  # type: ignore[assignment,attr-defined,misc]
    if "FAKE_HOLD_AFTER" in os.environ:
        engine.hold_after(int(os.environ["FAKE_HOLD_AFTER"]))
    if "FAKE_STOP_SECONDS" in os.environ:
        worker.stop_signals.MAX_STOP_SECONDS = float(os.environ["FAKE_STOP_SECONDS"])
    if "FAKE_HANGING_STORE" in os.environ:
        worker.run.select_result_store = lambda *args, **kwargs: HangingStore()  # type: ignore[attr-defined]
    settings = WorkerSettings(model="fake")
    if "FAKE_HANGING_START" in os.environ:
        engine.start = lambda: hang_and_say_so(settings.redis_url)
    worker.run.run_worker(settings)


def hang_and_say_so(redis_url: str) -> None:
    with redis.Redis.from_url(redis_url) as client:
        client.set(STARTING_KEY, 1)
    time.sleep(3600)


if __name__ == "__main__":
    main()
