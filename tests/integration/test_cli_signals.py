"""Commands that are interrupted: what becomes of their jobs and files, and what they say."""

import json
import signal
from pathlib import Path

import pytest

from tests.fakes.command_line import Invoke, start
from tests.fakes.fake_worker import FakeWorker, echo


def test_ctrl_c_leaves_the_output_whole_and_a_second_run_collects(
    promptmill: Invoke, worker: FakeWorker, redis_url: str, tmp_path: Path
) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [{"custom_id": str(i), "url": "/v1/completions", "body": {"prompt": f"p{i}"}} for i in range(3)]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    process = start("run", str(source), str(target), url=redis_url)
    echo(worker.claim())
    while not (target.exists() and target.read_bytes().endswith(b"\n")):
        assert process.poll() is None
        signal.sigtimedwait([], 0.01)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "run the same command again" in stderr and "Traceback" not in stderr
    with worker.serving(echo):
        result = promptmill("run", str(source), str(target))
    assert result.exit_code == 0
    assert {json.loads(line)["custom_id"] for line in target.read_text().splitlines()} == {"0", "1", "2"}


@pytest.mark.parametrize("is_table", [False, True], ids=["lines", "table"])
def test_the_jobs_that_an_interrupted_run_has_left_are_ended_and_asked_anew_by_the_next(
    promptmill: Invoke, worker: FakeWorker, redis_url: str, tmp_path: Path, is_table: bool
) -> None:
    if is_table:
        source, target, written = (tmp_path / name for name in ("in.csv", "out.csv", "out.csv.journal"))
        source.write_text("text\n,\none\ntwo\nthree\n")  # the first row is broken
        command = ["run", str(source), str(target), "--prompt", "{text}"]
    else:
        source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
        written = target
        lines = [{"custom_id": str(i), "url": "/v1/completions", "body": {"prompt": f"p{i}"}} for i in range(3)]
        source.write_text("{broken\n" + "".join(json.dumps(line) + "\n" for line in lines))
        command = ["run", str(source), str(target)]
    process = start(*command, url=redis_url)
    held = worker.claim()
    echo(held)
    while not (written.exists() and held.job_id.encode() in written.read_bytes()):
        assert process.poll() is None
        signal.sigtimedwait([], 0.01)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130 and "or with --cancel" in stderr
    answered = written.read_bytes()
    for num_left in (2, 0):
        ended = promptmill(*command, "--cancel")
        assert (ended.exit_code, ended.stderr) == (0, f"{num_left} jobs cancelled\n")
    assert written.read_bytes() == answered
    with worker.serving(echo):
        again = promptmill(*command)
    assert again.exit_code == 1 and "3 answered, 1 failed" in again.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_submit_cancels_the_job(worker: FakeWorker, redis_url: str, number: signal.Signals) -> None:
    inherited = signal.signal(number, signal.SIG_DFL)  # under nohup SIGHUP is ignored, and submit leaves it so
    process = start("submit", "hello", url=redis_url)
    signal.signal(number, inherited)
    held = worker.claim().begin()
    process.send_signal(number)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert f"job {held.job_id} was cancelled" in stderr and "Traceback" not in stderr
    assert held.is_cancelled()


def test_a_reader_that_goes_away_from_a_stream_cancels_the_job(worker: FakeWorker, redis_url: str) -> None:
    process = start("submit", "hello", "--stream", url=redis_url)
    held = worker.claim().begin()
    held.write("one")
    assert process.stdout.read(3) == "one"
    process.stdout.close()
    held.write("two")
    assert process.wait(30) == 1
    assert held.is_cancelled()
    assert "Traceback" not in process.stderr.read()
    process.stderr.close()
