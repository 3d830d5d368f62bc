"""`promptmill run --retry-failed`: exactly what failed is asked again, and an error is gone once there is an answer."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from producer import BatchFileError
from producer.batch.run import BatchProgress
from producer.contract import ErrorCode, ErrorInfo
from tests.fakes.batch_runs import answers, by_id, chat, completion, run
from tests.fakes.command_line import Invoke
from tests.fakes.fake_worker import Behaviour, FakeWorker, echo
from tests.fakes.held_job import HeldJob
from tests.integration.client.test_table_run import rows
from worker.started_process import StartedProcess


class Moody:
    """Fails every third prompt, until it is told to be good."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.is_good = False

    def __call__(self, held: HeldJob) -> None:
        text = held.arguments["messages"][-1]["content"]
        self.asked.append(text)
        if not self.is_good and int(text.split()[-1]) % 3 == 0:
            held.begin().end("failed", error=ErrorInfo(code=ErrorCode.ENGINE_ERROR, message="in a mood"))
        else:
            echo(held)


def write_lines(path: Path, num_lines: int) -> None:
    path.write_text("".join(chat(f"r{number}", f"word {number}") + "\n" for number in range(num_lines)))


def failed_ids(target: Path) -> list[str]:
    return [answer["custom_id"] for answer in answers(target) if answer["response"]["status_code"] >= 400]


def test_exactly_the_lines_that_failed_are_asked_again(
    redis_url: str, worker: FakeWorker, files: tuple[Path, Path]
) -> None:
    write_lines(files[0], 9)
    moody = Moody()
    with worker.serving(moody):
        assert run(redis_url, files).num_failed == 3
        good = [line for line in files[1].read_bytes().splitlines() if b'"status_code": 200' in line]
        moody.asked.clear()
        assert run(redis_url, files).num_failed == 3 and not moody.asked  # without the flag they are answered
        moody.is_good = True
        seen: list[tuple[int, int]] = []
        progress = run(
            redis_url,
            files,
            retries_failed=True,
            on_progress=lambda now: seen.append((now.num_done, now.num_failed)),
        )
    assert sorted(moody.asked) == ["word 0", "word 3", "word 6"]
    assert seen[0] == (6, 0) and (progress.num_done, progress.num_failed) == (9, 0)
    assert files[1].read_bytes().splitlines()[:6] == good
    assert sorted(by_id(files[1])) == [f"r{number}" for number in range(9)] and len(answers(files[1])) == 9
    assert not failed_ids(files[1])
    assert sorted(path.name for path in files[0].parent.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_lines_that_fail_again_are_run_each_time_they_are_asked_for(
    redis_url: str, worker: FakeWorker, files: tuple[Path, Path]
) -> None:
    files[0].write_text(chat("a", "word 0") + "\n{broken\n" + completion("hot", "x", temperature=9) + "\n")
    moody = Moody()
    with worker.serving(moody):
        run(redis_url, files)
        first = answers(files[1])
        for num_asked in range(2, 15):
            progress = run(redis_url, files, retries_failed=True)
            assert (len(moody.asked), progress.num_done, progress.num_failed) == (num_asked, 3, 3)
            assert len(answers(files[1])) == 3
        assert {answer["id"] for answer in first} & {answer["id"] for answer in answers(files[1])} == {
            "batch_req_line_2",
            "batch_req_line_3",
        }
        moody.is_good = True
        assert run(redis_url, files, retries_failed=True).num_failed == 2
        assert run(redis_url, files).num_failed == 2  # its own answers, whichever run they are of
    assert len(moody.asked) == 15


def test_a_failed_job_that_was_retried_itself_is_not_run_once_more(
    redis_url: str, worker: FakeWorker, files: tuple[Path, Path], promptmill: Invoke
) -> None:
    files[0].write_text(chat("a", "word 0") + "\n")
    moody = Moody()
    with worker.serving(moody):
        run(redis_url, files)
        moody.is_good = True
        job_id = answers(files[1])[0]["id"].removeprefix("batch_req_")
        worker.connection.zadd("rq:failed:promptmill", {job_id: 2e9})
        assert promptmill("retry", job_id).exit_code == 0
        assert promptmill("result", job_id, "--timeout", "30").exit_code == 0
        assert run(redis_url, files, retries_failed=True).num_failed == 0
    assert len(moody.asked) == 2


@pytest.mark.parametrize("moment", ["before it is renamed", "behind it"])
def test_a_retry_that_dies_over_its_output_leaves_it_whole(
    redis_url: str, worker: FakeWorker, files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    write_lines(files[0], 9)
    moody = Moody()
    rename = os.replace

    def die(path: Path, target: Path) -> None:
        if moment == "behind it":
            rename(path, target)
        raise KeyboardInterrupt

    with worker.serving(moody):
        run(redis_url, files)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(os, "replace", die)
            run(redis_url, files, retries_failed=True)
        assert len(answers(files[1])) == (9 if moment == "before it is renamed" else 6)
        moody.is_good = True
        assert run(redis_url, files, retries_failed=True).num_failed == 0
    assert len(moody.asked) == 12 and len(answers(files[1])) == len(by_id(files[1])) == 9
    assert sorted(path.name for path in files[0].parent.iterdir()) == ["in.jsonl", "out.jsonl"]


KILLED_RUN = """
import os, signal
from producer import cli
os.replace = lambda source, target: os.kill(os.getpid(), signal.SIGKILL)
cli.main()
"""


@pytest.mark.parametrize("moment", ["a retry of lines", "a retry of rows", "the end of a table"])
def test_what_a_run_that_is_killed_leaves_beside_its_output_is_gone_with_the_next(
    redis_url: str, worker: FakeWorker, tmp_path: Path, moment: str
) -> None:
    is_table = moment != "a retry of lines"
    suffix = "csv" if is_table else "jsonl"
    source, target = tmp_path / f"in.{suffix}", tmp_path / f"out.{suffix}"
    command = ["run", str(source), str(target), *(["--prompt", "{text}"] if is_table else [])]
    environment = {**os.environ, "PROMPTMILL_REDIS_URL": redis_url}

    def end_of(*start: str) -> int:
        return subprocess.run([sys.executable, *start, *command], env=environment, capture_output=True).returncode

    def names() -> set[str]:
        return {path.name for path in tmp_path.iterdir()}

    if is_table:
        source.write_text("text\nword 0\nword 1\n")
    else:
        write_lines(source, 2)
    ordinary = {source.name, target.name} | ({f"{target.name}.journal"} if is_table else set())
    with worker.serving(Moody()):
        if moment != "the end of a table":
            assert end_of("-m", "producer") == 1 and names() == ordinary
            command.append("--retry-failed")
        assert end_of("-c", KILLED_RUN) == -9
        [left] = names() - ordinary
        assert left.startswith(".out.")
        if moment != "a retry of rows":
            command = command[:-1] if not is_table else command  # whichever way it is run again
        assert end_of("-m", "producer") == 1
    assert names() == ordinary


def test_nobody_else_writes_the_output_meanwhile_nor_does_it_lose_its_rights_or_its_link(
    redis_url: str, worker: FakeWorker, files: tuple[Path, Path]
) -> None:
    write_lines(files[0], 3)
    elsewhere = files[1].parent / "elsewhere.jsonl"
    elsewhere.touch(0o600)
    files[1].symlink_to(elsewhere.name)
    refused: list[str] = []

    def run_again(progress: BatchProgress) -> None:
        with pytest.raises(BatchFileError, match="another `promptmill run` writes") as error:
            run(redis_url, files, retries_failed=True)
        refused.append(str(error.value))

    moody = Moody()
    with worker.serving(moody):
        run(redis_url, files)
        moody.is_good = True
        assert run(redis_url, files, retries_failed=True, on_progress=run_again).num_failed == 0
    assert refused and files[1].is_symlink() and len(by_id(elsewhere)) == 3
    assert elsewhere.stat().st_mode & 0o777 == 0o600


def _killing(moody: Moody, running: list[StartedProcess], at: tuple[int, ...]) -> Behaviour:
    def strike(held: HeldJob) -> None:
        moody(held)
        if len(moody.asked) in at:
            running[-1].kill()
            running[-1].wait(60)

    return strike


@pytest.mark.parametrize("kind", ["lines", "table"])
def test_a_retry_that_is_killed_goes_on_and_asks_nothing_twice(
    redis_url: str, worker: FakeWorker, tmp_path: Path, kind: str
) -> None:
    if kind == "lines":
        source, target, prompt = tmp_path / "in.jsonl", tmp_path / "out.jsonl", list[str]()
        write_lines(source, 90)
    else:
        source, target, prompt = tmp_path / "in.csv", tmp_path / "out.csv", ["--prompt", "{text}"]
        source.write_text("text\n" + "".join(f"word {number}\n" for number in range(90)))
    command = [sys.executable, "-m", "producer", "run", *map(str, (source, target)), *prompt]
    command += ["--max-in-flight", "8"]  # so many are answered while nobody runs: the next kill finds a run
    environment = {**os.environ, "PROMPTMILL_REDIS_URL": redis_url}
    moody, running = Moody(), list[StartedProcess]()

    def start(*flags: str) -> int:
        running.append(StartedProcess([*command, *flags], env=environment, stderr=subprocess.DEVNULL))
        return running[-1].wait(120)

    with worker.serving(_killing(moody, running, at=(100, 115))):
        assert start() == 1
        moody.is_good = True
        assert [start("--retry-failed") for _ in range(3)] == [-9, -9, 0]
    assert len(moody.asked) == 120 and sorted(moody.asked[90:]) == sorted(f"word {n}" for n in range(0, 90, 3))
    expected = [f"word {number} " for number in range(90)]
    if kind == "lines":
        found = {name: _text(answer) for name, answer in by_id(target).items()}
        assert [found[f"r{number}"] for number in range(90)] == expected and len(answers(target)) == 90
    else:
        assert [row["response"] for row in rows(target)] == expected
    assert sorted(tmp_path.iterdir()) == sorted([source, target])


def _text(answer: dict[str, Any]) -> str:
    return str(answer["response"]["body"]["choices"][0]["message"]["content"])


def test_the_command_says_how_to_ask_again(promptmill: Invoke, worker: FakeWorker, files: tuple[Path, Path]) -> None:
    write_lines(files[0], 3)
    moody = Moody()
    with worker.serving(moody):
        failed = promptmill("run", *files)
        moody.is_good = True
        retried = promptmill("run", *files, "--retry-failed")
    assert failed.exit_code == 1 and "the same command with --retry-failed asks again what failed" in failed.stderr
    assert retried.exit_code == 0 and "3 answered, 0 failed" in retried.stderr and "again" not in retried.stderr


def test_a_line_that_would_fail_again_is_not_said_to_be_worth_asking_again(
    promptmill: Invoke, worker: FakeWorker, files: tuple[Path, Path]
) -> None:
    lines = [chat("a", "word 1"), "{broken", chat("a", "word 2"), completion("hot", "x", temperature=9)]
    files[0].write_text("\n".join([*lines, chat("long", "word 4")]) + "\n")

    def refuse_the_long_one(held: HeldJob) -> None:
        if held.arguments["messages"][-1]["content"] == "word 4":
            too_long = ErrorInfo(code=ErrorCode.CONTEXT_LENGTH_EXCEEDED, message="messages: too long")
            held.begin().end("failed", error=too_long)
        else:
            echo(held)

    with worker.serving(refuse_the_long_one):
        runs = [promptmill("run", *files) for _ in range(2)]  # the second finds the errors answered already
    for found in runs:
        assert found.exit_code == 1 and "1 answered, 4 failed" in found.stderr and "again" not in found.stderr
