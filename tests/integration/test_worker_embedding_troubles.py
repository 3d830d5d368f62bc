"""Jobs of task `embed` where something dies, over and over or in their midst: real child processes, real workers."""

import signal
from pathlib import Path
from typing import Any

import pytest
import redis
from rq import Queue, Retry
from rq.job import JobStatus

from producer import Client
from producer.contract import Done, ErrorCode, Marker, keys
from tests.fakes.fake_embeddings import expected_vector
from tests.fakes.fake_tokenizer import POISON_TOKEN
from tests.fakes.waiting import WAIT_SECONDS, wait_until
from tests.fakes.worker_runs import (
    FUNCTION,
    WorkerProcess,
    WorkerThread,
    leftovers,
    wait_for_no_leftovers,
    wait_for_result,
)
from tests.integration.test_worker_embeddings import stream_of
from tests.integration.test_worker_engine import POISON, SOUND, kill_child, worker_on
from worker.claim import MAX_CRASHES

REFUSED = 8  # first token of a prompt
NUM_INPUTS = 60


def inputs(number: int = NUM_INPUTS) -> list[list[int]]:
    return [[SOUND, 20 + at // 100, 30 + at % 100] for at in range(number)]


def vectors_of(prompts: list[list[int]]) -> list[list[float]]:
    return [expected_vector(prompt).tolist() for prompt in prompts]


def num_computed(folder: Path) -> int:
    """Embeddings that children on this folder have computed."""
    file = folder / "embeddings"
    return file.stat().st_size if file.exists() else 0


def test_an_input_that_kills_its_child_each_time_fails_its_job_alone_and_is_not_retried(
    redis_url: str, queue: Queue, redis_client: redis.Redis, tmp_path: Path
) -> None:
    with worker_on(redis_url, tmp_path, killed_by=POISON, step_seconds=0.002) as worker:
        text = queue.enqueue(FUNCTION, prompt=[SOUND, 20], max_tokens=100)
        before = queue.enqueue(FUNCTION, task="embed", inputs=inputs())
        poisoned = [*inputs(3), [POISON, 20], *inputs(3)]
        poison = queue.enqueue(FUNCTION, task="embed", inputs=poisoned, retry=Retry(max=2), metadata={"row": 1})
        after = queue.enqueue(FUNCTION, task="embed", inputs=inputs())
        results = [wait_for_result(redis_client, job.id) for job in (text, before, poison, after)]
        assert [result.status for result in results] == ["finished", "finished", "failed", "finished"]
        assert {result.attempts for result in results} == {1}
        failed = results[2]
        assert failed.error is not None and failed.error.code is ErrorCode.POISON
        assert "killed by SIGKILL" in failed.error.message
        assert (failed.embeddings, failed.choices, failed.metadata) == (None, [], {"row": 1})
        assert results[1].vectors == results[3].vectors == vectors_of(inputs())
        assert worker.engine.get_stats()["num_restarts"] == 3
        marker, done = stream_of(redis_client, poison.id)
        assert isinstance(marker, Marker) and isinstance(done, Done) and done.status == "failed"
        wait_until(lambda: queue.failed_job_registry.get_job_ids() == [poison.id])
        wait_for_no_leftovers(redis_client)


def test_the_vectors_of_other_inputs_do_not_clear_the_one_that_kills_its_child_each_time(
    redis_url: str, queue: Queue, redis_client: redis.Redis, tmp_path: Path
) -> None:
    """As that of a long input does, whose last step comes when shorter ones have ended beside it."""
    with worker_on(redis_url, tmp_path, killed_by=POISON, killed_at=2, step_seconds=0.002) as worker:
        before = queue.enqueue(FUNCTION, task="embed", inputs=inputs())
        poison = queue.enqueue(FUNCTION, task="embed", inputs=[[POISON, 20], *inputs(500)])
        after = queue.enqueue(FUNCTION, task="embed", inputs=inputs())
        results = [wait_for_result(redis_client, job.id) for job in (before, poison, after)]
        assert [result.status for result in results] == ["finished", "failed", "finished"]
        assert results[1].error is not None and results[1].error.code is ErrorCode.POISON
        assert results[0].vectors == results[2].vectors == vectors_of(inputs())
        assert worker.engine.get_stats()["num_restarts"] == 3
        wait_for_no_leftovers(redis_client)


def test_a_child_killed_amid_a_batch_of_inputs_costs_no_attempt_and_computes_none_twice(
    redis_url: str, queue: Queue, redis_client: redis.Redis, tmp_path: Path
) -> None:
    with worker_on(redis_url, tmp_path, step_seconds=0.01) as worker:
        job = queue.enqueue(FUNCTION, task="embed", inputs=inputs())
        for num_kills in (1, 2, 3):
            wait_until(lambda: num_computed(tmp_path) >= 10 * num_kills)  # noqa: B023
            kill_child(worker)
            wait_until(lambda: worker.engine.get_stats()["num_restarts"] == num_kills)  # noqa: B023
        result = wait_for_result(redis_client, job.id)
        assert (result.status, result.attempts, result.vectors) == ("finished", 1, vectors_of(inputs()))
        assert NUM_INPUTS <= num_computed(tmp_path) <= NUM_INPUTS + 3  # what was in the pipe of each that was killed
        wait_for_no_leftovers(redis_client)


def test_a_cancel_amid_a_batch_of_inputs_has_the_child_forget_the_rest(
    redis_url: str, client: Client, redis_client: redis.Redis, tmp_path: Path
) -> None:
    with worker_on(redis_url, tmp_path, step_seconds=0.01) as worker:
        job = client.submit(task="embed", inputs=inputs(2000), metadata={"row": 1})
        wait_until(lambda: num_computed(tmp_path) >= 5)
        assert job.cancel()
        result = job.result(60)
        assert (result.status, result.embeddings, result.metadata) == ("cancelled", None, {"row": 1})
        wait_until(lambda: worker.engine.get_stats()["num_running"] == 0)
        num_before = num_computed(tmp_path)
        assert num_before < 2000
        assert client.embed(inputs(3), timeout=60) == vectors_of(inputs(3))
        assert num_computed(tmp_path) == num_before + 3
        wait_for_no_leftovers(redis_client)


def test_a_job_that_fails_is_run_as_often_as_its_retries_say(
    redis_url: str, queue: Queue, redis_client: redis.Redis, tmp_path: Path
) -> None:
    with worker_on(redis_url, tmp_path, refused=REFUSED):
        prompts = [*inputs(3), [REFUSED, 20], *inputs(3)]
        job = queue.enqueue(FUNCTION, task="embed", inputs=prompts, retry=Retry(max=2))
        result = wait_for_result(redis_client, job.id)
        assert (result.status, result.attempts, result.embeddings) == ("failed", 3, None)
        assert result.error is not None and "this prompt is refused" in result.error.message
        wait_until(lambda: job.get_status() is JobStatus.FAILED)
        wait_for_no_leftovers(redis_client)


def test_a_retried_job_begins_its_stream_anew_and_has_the_vectors_of_one_attempt(
    worker_thread: WorkerThread, queue: Queue, redis_client: redis.Redis, client: Client
) -> None:
    engine = worker_thread.engine
    engine.pause()
    job = queue.enqueue(FUNCTION, task="embed", inputs=inputs(5), retry=Retry(max=1))
    wait_until(lambda: engine.running == [f"{job.id}:1"])
    engine.fail(job.id)
    wait_until(lambda: engine.running == [f"{job.id}:2"])
    assert not redis_client.exists(keys.result_key(job.id))
    engine.go_on()
    result = client.job(job.id).result(60)
    assert (result.status, result.attempts, result.vectors) == ("finished", 2, vectors_of(inputs(5)))
    *_, marker, done = stream_of(redis_client, job.id)
    assert isinstance(marker, Marker) and marker.reset and isinstance(done, Done) and done.status == "finished"
    wait_until(lambda: job.get_status() is JobStatus.FINISHED)
    wait_for_no_leftovers(redis_client)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_worker_that_ends_amid_a_batch_of_inputs_leaves_the_whole_of_it_to_the_next(
    redis_url: str, redis_client: redis.Redis, number: signal.Signals
) -> None:
    settings: dict[str, Any] = {"step_seconds": 0.1, "stop_seconds": WAIT_SECONDS, "lease_seconds": 2}
    with Client(redis_url) as client, WorkerProcess(redis_url, **settings) as first:
        first.wait_until_serving()
        job = client.submit(task="embed", inputs=inputs(200))  # 20 s of work
        wait_until(lambda: redis_client.xlen(keys.stream_key(job.id)))
        beside = client.submit("Hello", max_tokens=5)
        beside.result(60)  # so the engine has made steps: some inputs are computed
        first.signal(number)
        assert first.wait() == (0 if number is signal.SIGTERM else -number)
        with WorkerThread(redis_url, lease_seconds=2):
            result = job.result(60)
            assert result.vectors == vectors_of(inputs(200)) and result.attempts == 2
            *markers, done = stream_of(redis_client, job.id)
            assert [marker.reset for marker in markers] == [False, False], "nothing was shown"
            assert isinstance(done, Done) and done.status == "finished"
            wait_for_no_leftovers(redis_client)


def test_a_job_that_kills_three_workers_fails_and_its_batch_mates_have_their_vectors(
    redis_url: str, queue: Queue, redis_client: redis.Redis
) -> None:
    mates = [queue.enqueue(FUNCTION, task="embed", inputs=inputs(5)).id for _ in range(2)]
    poison = queue.enqueue(FUNCTION, task="embed", inputs=[*inputs(2), [POISON_TOKEN]], retry=Retry(max=3)).id
    mates += [queue.enqueue(FUNCTION, task="embed", inputs=inputs(5)).id for _ in range(2)]

    def have_ended() -> bool:
        return all(redis_client.exists(keys.result_key(job_id)) for job_id in [*mates, poison])

    num_deaths = 0
    while not have_ended():
        with WorkerProcess(redis_url, lease_seconds=2, step_seconds=0.02) as worker:
            wait_until(lambda: worker.process.poll() is not None or have_ended())
            num_deaths += worker.process.poll() is not None
    assert num_deaths == MAX_CRASHES
    failed = wait_for_result(redis_client, poison)
    assert failed.status == "failed" and failed.error is not None and failed.error.code is ErrorCode.POISON
    assert (failed.embeddings, failed.choices) == (None, []) and queue.failed_job_registry.get_job_ids() == [poison]
    for job_id in mates:
        assert wait_for_result(redis_client, job_id).vectors == vectors_of(inputs(5))
    wait_until(lambda: not [key for key in leftovers(redis_client) if "leases" in key])
