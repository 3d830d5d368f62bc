"""Commands that are interrupted: what becomes of their jobs and files, and what they say."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_the_command_line_is_imported_ends_it_quietly(tmp_path: Path, number: signal.Signals) -> None:
    with importing(tmp_path, [sys.executable, "-m", "producer", "status"]) as process:
        process.send_signal(number)
        _, stderr = process.communicate(timeout=30)
    assert (process.returncode, stderr) == (-number, "")


def test_the_first_process_of_a_container_gets_a_signal_while_the_command_line_is_imported(tmp_path: Path) -> None:
    """Linux keeps from it what it has no handler for."""
    contained = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child"]
    if shutil.which("unshare") is None or subprocess.run([*contained, "true"], stderr=subprocess.DEVNULL).returncode:
        pytest.skip("no process can be put into a namespace of its own here")
    with importing(tmp_path, [*contained, sys.executable, "-m", "producer", "status"]) as process:
        first = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
        os.kill(int(first), signal.SIGTERM)
        _, stderr = process.communicate(timeout=30)
    assert (process.returncode, stderr) == (128 + signal.SIGTERM, "")


@contextmanager
def importing(folder: Path, command: list[str]) -> "Iterator[subprocess.Popen[str]]":
    """A command that stays amid the import of its first package."""
    (folder / "click.py").write_text("import signal\nprint('importing', flush=True)\nsignal.pause()\n")
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "importing\n"
            yield process
        finally:
            process.kill()


def test_a_command_that_is_started_with_its_standard_files_closed_takes_no_socket_for_them(tmp_path: Path) -> None:
    """What is printed would go to Redis, and uvloop aborts where it is to close one."""
    seen = tmp_path / "seen"
    look = "import os, pathlib\nfiles = [os.readlink(f'/proc/self/fd/{number}') for number in range(3)]\n"
    (tmp_path / "click.py").write_text(f"{look}pathlib.Path({str(seen)!r}).write_text(' '.join(files))\nos._exit(0)\n")
    closing = ["bash", "-c", 'exec "$@" <&- >&- 2>&-', "bash"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    subprocess.run([*closing, sys.executable, "-m", "producer", "status"], env=environment, check=True, timeout=60)
    assert seen.read_text() == "/dev/null /dev/null /dev/null"
