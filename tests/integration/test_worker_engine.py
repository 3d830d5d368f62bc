"""A worker on the real engine, its child a process that echoes prompts: deaths of the child, and resumed text."""

import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import redis
from rq import Queue

from engine import InferenceEngine
from engine.process import ChildProcess
from producer.contract import Choice, ErrorCode, Marker, Result, keys
from tests.fakes.fake_core import CORE_PATH, write_fake_model
from tests.fakes.redis_reads import stream_rows
from tests.fakes.waiting import wait_until
from tests.fakes.worker_runs import (
    FUNCTION,
    WorkerThread,
    stored_chunks,
    stream_text,
    wait_for_no_leftovers,
    wait_for_result,
)

POISON, HANGING, SOUND = 7, 8, 9  # first tokens of prompts


def worker_on(redis_url: str, folder: Path, *, step_timeout_seconds: float = 60.0, **script: object) -> WorkerThread:
    engine = InferenceEngine(
        write_fake_model(folder, **script),
        step_timeout_seconds=step_timeout_seconds,
        _start_child=partial(ChildProcess, core_path=CORE_PATH),
    )
    engine.start()  # before the worker, which asks it for its model
    return WorkerThread(redis_url, engine)  # type: ignore[arg-type]


def kill_child(worker: WorkerThread) -> None:
    engine: Any = worker.engine
    child = engine._supervisor._child.running
    assert isinstance(child, ChildProcess)
    os.kill(child.pid, signal.SIGKILL)


def echo(prompt: list[int], num_tokens: int) -> list[int]:
    return [prompt[at % len(prompt)] for at in range(num_tokens)]


def has_put_out(client: redis.Redis, job_id: str, num_entries: int) -> None:
    wait_until(lambda: client.xlen(keys.stream_key(job_id)) > num_entries)


def test_a_child_that_is_killed_costs_no_lease_no_attempt_and_no_token(
    redis_url: str, queue: Queue, redis_client: redis.Redis, tmp_path: Path
) -> None:
    with worker_on(redis_url, tmp_path, step_seconds=0.01) as worker:
        prompts = {
            queue.enqueue(FUNCTION, prompt=prompt, max_tokens=200).id: prompt
            for prompt in ([SOUND + at, 20, 30] for at in range(4))
        }
        for job_id in prompts:
            has_put_out(redis_client, job_id, 3)
        kill_child(worker)
        for job_id, prompt in prompts.items():
            result = wait_for_result(redis_client, job_id)
            assert result.choices[0].token_ids == echo(prompt, 200) and result.attempts == 1
            assert stream_text(redis_client, job_id) == result.text
        wait_for_no_leftovers(redis_client)


def test_a_job_that_kills_the_child_three_times_fails_alone(
    redis_url: str, queue: Queue, redis_client: redis.Redis, tmp_path: Path
) -> None:
    with worker_on(redis_url, tmp_path, killed_by=POISON, step_seconds=0.001):
        jobs = [queue.enqueue(FUNCTION, prompt=[POISON if at == 3 else SOUND, 20], max_tokens=300) for at in range(6)]
        results = [wait_for_result(redis_client, job.id) for job in jobs]
        assert [result.status for result in results] == ["finished"] * 3 + ["failed"] + ["finished"] * 2
        assert results[3].error is not None and results[3].error.code is ErrorCode.POISON
        assert {result.attempts for result in results} == {1}
        wait_for_no_leftovers(redis_client)


@pytest.mark.parametrize("how", ["hung_by", "stopped_by"])
def test_a_child_that_hangs_is_killed_and_its_jobs_go_on(
    how: str, redis_url: str, queue: Queue, redis_client: redis.Redis, tmp_path: Path
) -> None:
    """Within a step, or in the middle of a message."""
    script = {how: HANGING, "killed_at": 20}
    with worker_on(redis_url, tmp_path, **script, step_seconds=0.001, step_timeout_seconds=1.0):
        jobs = [queue.enqueue(FUNCTION, prompt=[token_id, 20], max_tokens=300) for token_id in (SOUND, HANGING)]
        results = [wait_for_result(redis_client, job.id) for job in jobs]
        assert {(result.status, result.attempts) for result in results} == {("finished", 1)}


TEXT = "the quick 😀 fox 你好 jumps over the lazy dog STOP "
ALMOST = f"lazy dog STOP {TEXT}X"  # held back for a whole round of the echo, and never completed
FIELDS = {"prompt": TEXT, "max_tokens": 150, "n": 3, "stop": [ALMOST, "lazy cat"], "ignore_eos": True}


def run_in_pieces(
    redis_url: str, queue: Queue, client: redis.Redis, folder: Path, num_workers: int, **fields: object
) -> Result:
    """The job's result after so many workers; all but the last hand it over in the middle."""
    job = queue.enqueue(FUNCTION, **{**FIELDS, **fields})
    for _ in range(num_workers - 1):
        num_entries = client.xlen(keys.stream_key(job.id))
        with worker_on(redis_url, folder, step_seconds=0.05):
            has_put_out(client, job.id, num_entries + 5)
    with worker_on(redis_url, folder):
        return wait_for_result(client, job.id)


@pytest.mark.parametrize("stop", [[ALMOST, "lazy cat"], [f"dog STOP {TEXT}the"]], ids=["never met", "met"])
def test_text_that_is_held_back_when_a_worker_goes_is_released_by_the_next(
    stop: list[str], redis_url: str, queue: Queue, redis_client: redis.Redis, tmp_path: Path
) -> None:
    """Several choices, characters of several tokens, and stop strings half seen, at whatever token the cut falls."""
    whole = run_in_pieces(redis_url, queue, redis_client, tmp_path, 1, stop=stop)
    pieces = run_in_pieces(redis_url, queue, redis_client, tmp_path, 3, stop=stop)
    assert pieces.attempts == 3 and pieces.usage.completion_tokens == whole.usage.completion_tokens
    assert pieces.choices == whole.choices
    rows = stream_rows(redis_client, keys.stream_key(pieces.job_id))
    markers = [Marker.model_validate_json(fields[b"m"]) for _, fields in rows if b"m" in fields]
    assert [marker.reset for marker in markers] == [False] * 3
    assert joined_choices(redis_client, pieces) == pieces.choices


def joined_choices(client: redis.Redis, result: Result) -> list[Choice]:
    chunks = stored_chunks(client, result.job_id)
    return [Choice.join(choice.index, chunks, cut_off="error") for choice in result.choices]
