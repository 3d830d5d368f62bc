"""A `BatchRun` that is broken off and run again: no line is asked twice, and none is left out."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import redis

from producer import BatchFileError, Client
from producer.batch.run import BatchProgress
from tests.fakes.batch_runs import answers, by_id, chat, run
from tests.fakes.fake_worker import FakeWorker, echo
from tests.fakes.held_job import HeldJob
from tests.fakes.waiting import wait_until
from worker.started_process import StartedProcess


def test_a_run_goes_on_behind_a_torn_line(redis_url: str, worker: FakeWorker, files: tuple[Path, Path]) -> None:
    files[0].write_text("".join(chat(f"r{i}", f"word {i}") + "\n" for i in range(10)))
    with worker.serving(echo):
        run(redis_url, files)
        whole = files[1].read_bytes()
        lines = whole.splitlines(keepends=True)
        files[1].write_bytes(b"".join(lines[:6]) + lines[6][:40])
        progress = run(redis_url, files)
    assert (progress.num_done, progress.num_failed) == (10, 0)
    found = answers(files[1])
    assert len(found) == 10 and set(by_id(files[1])) == {f"r{i}" for i in range(10)}


def test_an_interrupted_run_is_taken_up_without_running_a_line_twice(
    redis_url: str, worker: FakeWorker, files: tuple[Path, Path], redis_client: redis.Redis
) -> None:
    files[0].write_text("".join(chat(f"r{i}", f"word {i}") + "\n" for i in range(40)))
    runs: list[str] = []

    def count(held: HeldJob) -> None:
        runs.append(held.job_id)
        echo(held)

    def interrupt(progress: BatchProgress) -> None:
        if progress.num_done == 5:
            raise KeyboardInterrupt

    with worker.serving(count):
        with pytest.raises(KeyboardInterrupt):
            run(redis_url, files, on_progress=interrupt)
        assert len(answers(files[1])) == 5
        progress = run(redis_url, files)
    assert (progress.num_done, progress.num_failed) == (40, 0)
    assert len(runs) == len(set(runs)) == 40
    assert set(by_id(files[1])) == {f"r{i}" for i in range(40)}


def test_a_job_that_came_to_nothing_unseen_is_run_anew(
    redis_url: str, worker: FakeWorker, files: tuple[Path, Path]
) -> None:
    files[0].write_text(chat("a", "word") + "\n")

    def interrupt_at_once(held: HeldJob) -> None:
        with Client(redis_url) as client:
            client.cancel(held.job_id)
        held.begin().end("cancelled")

    def stop(progress: BatchProgress) -> None:
        if progress.num_done:
            raise KeyboardInterrupt

    with worker.serving(interrupt_at_once), pytest.raises(KeyboardInterrupt):
        run(redis_url, files, on_progress=stop)
    [seen] = answers(files[1])
    assert seen["error"]["code"] == "batch_cancelled"
    files[1].unlink()
    with worker.serving(echo):
        progress = run(redis_url, files)
    assert (progress.num_done, progress.num_failed) == (1, 0)


def test_another_run_of_the_same_file_is_run_anew(redis_url: str, worker: FakeWorker, files: tuple[Path, Path]) -> None:
    files[0].write_text(chat("a", "word") + "\n")
    with worker.serving(echo):
        first = run(redis_url, files)
        ids = [answers(files[1])[0]["id"]]
        for run_id in ("", "second"):
            files[1].unlink()
            run(redis_url, files, run_id=run_id)
            ids.append(answers(files[1])[0]["id"])
    assert first.num_done == 1
    assert ids[0] == ids[1] != ids[2]


def test_answers_to_another_input_or_run_are_not_taken_for_this_ones(
    redis_url: str, worker: FakeWorker, files: tuple[Path, Path]
) -> None:
    files[0].write_text(chat("a", "word") + "\n")
    with worker.serving(echo):
        run(redis_url, files)
        before = files[1].read_bytes()
        with pytest.raises(
            BatchFileError, match=r"out\.jsonl, line 1, answers another input, or goes with another --model"
        ):
            run(redis_url, files, run_id="second")
        files[0].write_text(chat("a", "another word") + "\n")
        with pytest.raises(BatchFileError, match=r"out\.jsonl, line 1, answers another input"):
            run(redis_url, files)
    assert files[1].read_bytes() == before


def test_a_run_that_was_killed_goes_on_and_asks_nothing_twice(
    redis_url: str, worker: FakeWorker, files: tuple[Path, Path]
) -> None:
    files[0].write_text("".join(chat(f"r{i}", f"word {i}") + "\n" for i in range(120)))
    command = [sys.executable, "-m", "producer", "run", *map(str, files), "--redis-url", redis_url]
    command += ["--max-in-flight", "32"]  # so many are answered while nobody runs: the next kill finds a run
    asked: list[str] = []
    running: list[StartedProcess] = []

    def strike(held: HeldJob) -> None:
        asked.append(held.job_id)
        echo(held)
        if len(asked) in (40, 80):
            running[-1].kill()
            running[-1].wait(60)

    with worker.serving(strike):
        for exit_code in (-9, -9, 0):
            running.append(StartedProcess(command, stderr=subprocess.DEVNULL))
            assert running[-1].wait(120) == exit_code
    assert len(asked) == len(set(asked)) == len(answers(files[1])) == len(by_id(files[1])) == 120


def test_two_runs_into_one_output_are_refused(redis_url: str, worker: FakeWorker, files: tuple[Path, Path]) -> None:
    files[0].write_text(chat("a", "word") + "\n")

    def run_again(progress: BatchProgress) -> None:
        with pytest.raises(BatchFileError, match="another `promptmill run` writes"):
            run(redis_url, files)

    with worker.serving(echo):
        assert run(redis_url, files, on_progress=run_again).num_done == len(answers(files[1])) == 1


def test_lines_whose_jobs_redis_loses_are_run_anew(
    redis_url: str, worker: FakeWorker, files: tuple[Path, Path], redis_client: redis.Redis
) -> None:
    """As in a fail-over to a replica that did not have them yet."""
    files[0].write_text("".join(chat(f"r{i}", f"word {i}") + "\n" for i in range(3)))
    found: list[BatchProgress] = []
    runs = threading.Thread(target=lambda: found.append(run(redis_url, files)))
    runs.start()
    queue = f"rq:queue:{worker.queue}"
    wait_until(lambda: redis_client.llen(queue) == 3)
    redis_client.delete(queue, *redis_client.keys("rq:job:*"))
    with worker.serving(echo):
        runs.join(60)
    assert (found[0].num_done, found[0].num_failed) == (3, 0)
    assert set(by_id(files[1])) == {f"r{i}" for i in range(3)}


def test_a_line_whose_result_is_gone_as_soon_as_it_is_there_is_not_run_again_and_again(
    redis_url: str, worker: FakeWorker, files: tuple[Path, Path]
) -> None:
    files[0].write_text(chat("a", "word") + "\n")
    runs: list[str] = []

    def end_without_a_result(held: HeldJob) -> None:
        runs.append(held.job_id)
        held.begin().connection.hset(f"rq:job:{held.job_id}", "status", "finished")

    with worker.serving(end_without_a_result):
        assert run(redis_url, files).num_failed == 1
    assert len(runs) == 1
    assert by_id(files[1])["a"]["error"] is None and by_id(files[1])["a"]["response"]["status_code"] == 404
