"""`promptmill run` over tables: a real Redis, a worker that echoes, real files."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from producer.batch.protocol import BatchOptions
from producer.batch.run import BatchProgress
from producer.errors import BatchFileError, InvalidJobError
from producer.settings import ProducerSettings
from producer.tables.run import TableOptions, TableRun
from producer.tables.select import open_table
from tests.fakes.command_line import Invoke
from tests.fakes.fake_worker import FakeWorker, echo
from tests.fakes.held_job import HeldJob
from worker.started_process import StartedProcess


def table_run(redis_url: str, source: Path, target: Path, prompt: str = "say {text}", **options: Any) -> TableRun:
    on_progress = options.pop("on_progress", lambda progress: None)
    retries_failed = options.pop("retries_failed", False)
    batch_options = BatchOptions(run_id=options.pop("run_id", ""))
    settings = ProducerSettings(redis_url=redis_url)
    table_options = TableOptions(prompt, **options)
    return TableRun(settings, source, target, table_options, batch_options, on_progress, retries_failed=retries_failed)


def write_rows(path: Path, num_rows: int) -> None:
    path.write_text("text\n" + "".join(f"word {number}\n" for number in range(num_rows)))


def rows(path: Path) -> list[dict[str, Any]]:
    return [dict(row.cells) for row in open_table(path).rows()]


def test_each_row_of_csv_is_answered_in_its_place(promptmill: Invoke, worker: FakeWorker, tmp_path: Path) -> None:
    source, target = tmp_path / "in.csv", tmp_path / "out.csv"
    source.write_text("custom_id,text\na,one two\nb,fail this\nc,three\n")
    asked: list[Any] = []

    def remember(held: HeldJob) -> None:
        asked.append(held.arguments)
        echo(held)

    with worker.serving(remember):
        options = ["--max-tokens", 2, "--temperature", 0, "--system", "Be {custom_id}.", "--stop", "x"]
        options += ["--model", "fake"]
        done = promptmill("run", source, target, "--prompt", "{text}", *options)
    assert done.exit_code == 1 and "2 answered, 1 failed" in done.stderr
    found = rows(target)
    assert [row["custom_id"] for row in found] == ["a", "b", "c"]
    assert [row["response"] for row in found] == ["one two ", "", "three "]
    assert [row["error"] for row in found] == ["", "engine_error: told to fail", ""]
    assert found[0]["finish_reason"] == "length" and found[0]["completion_tokens"] == "8"
    by_prompt = {arguments["messages"][-1]["content"]: arguments for arguments in asked}
    messages = by_prompt["one two"].pop("messages")
    assert messages == [{"role": "system", "content": "Be a."}, {"role": "user", "content": "one two"}]
    assert by_prompt["one two"] == {"v": 1, "model": "fake", "max_tokens": 2, "temperature": 0, "stop": ["x"]}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.csv", "out.csv", "out.csv.journal"]


def test_parquet_rows_are_completions_where_the_template_of_the_model_is_left_out(
    promptmill: Invoke, worker: FakeWorker, tmp_path: Path
) -> None:
    source, target = tmp_path / "in.parquet", tmp_path / "out.parquet"
    pq.write_table(pa.table({"text": ["one two", None, "fail"], "n": [1, 2, 3]}), source)
    asked: list[Any] = []

    def remember(held: HeldJob) -> None:
        asked.append(held.arguments)
        echo(held)

    with worker.serving(remember):
        done = promptmill("run", source, target, "--prompt", "{text}", "--raw", "--prefix", "a_", "--min-tokens", 20)
    assert sorted(asked, key=lambda arguments: str(arguments["prompt"])) == [
        {"v": 1, "prompt": text, "min_tokens": 20} for text in ("fail", "one two")
    ]  # no limit of tokens, as `promptmill submit --raw` has none
    assert done.exit_code == 1 and "1 answered, 2 failed" in done.stderr
    out = pq.read_table(target).to_pylist()
    assert [row["n"] for row in out] == [1, 2, 3]
    assert [row["a_response"] for row in out] == ["one two ", None, None]
    assert out[1]["a_error"].startswith("null_cell: column 'text' is null")
    assert out[2]["a_error"] == "engine_error: told to fail"
    assert out[0]["a_prompt_tokens"] == 2


def test_null_cells_can_read_as_a_text(redis_url: str, worker: FakeWorker, tmp_path: Path) -> None:
    source, target = tmp_path / "in.parquet", tmp_path / "out.jsonl"
    pq.write_table(pa.table({"text": ["a", None]}), source)
    with worker.serving(echo):
        assert table_run(redis_url, source, target, null_text="nothing").run().num_failed == 0
    found = [json.loads(line) for line in target.read_text().splitlines()]
    assert [row["response"] for row in found] == ["say a ", "say nothing "]
    assert found[1]["text"] is None


def test_bad_rows_fail_alone_in_their_place(redis_url: str, worker: FakeWorker, tmp_path: Path) -> None:
    source, target = tmp_path / "in.csv", tmp_path / "out.csv"
    source.write_bytes(b"text,n\ngood,1\nshort\nbad \xff,2\n,3\ngood,4\n")
    with worker.serving(echo):
        progress = table_run(redis_url, source, target, prompt="{text}").run()
    assert (progress.num_lines, progress.num_done, progress.num_failed) == (5, 5, 3)
    lines = target.read_bytes().splitlines()
    assert [line.split(b",")[0] for line in lines[1:]] == [b"good", b"short", b"bad \xff", b"", b"good"]
    errors = [row["error"].partition(":")[0] for row in rows(target)]
    assert errors == ["", "invalid_row", "invalid_row", "empty_prompt", ""]


@pytest.mark.parametrize("suffix", ["csv", "parquet", "jsonl"])
def test_a_run_that_was_interrupted_goes_on_and_asks_nothing_twice(
    redis_url: str, worker: FakeWorker, tmp_path: Path, suffix: str
) -> None:
    source, target = tmp_path / "in.csv", tmp_path / f"out.{suffix}"
    journal = target.with_name(target.name + ".journal")
    write_rows(source, 40)
    asked: list[str] = []

    def count(held: HeldJob) -> None:
        asked.append(held.job_id)
        echo(held)

    def interrupt(progress: BatchProgress) -> None:
        if progress.num_done == 15:
            raise KeyboardInterrupt

    with worker.serving(count):
        with pytest.raises(KeyboardInterrupt):
            table_run(redis_url, source, target, on_progress=interrupt).run()
        assert not target.exists()
        with journal.open("ab") as file:
            file.write(b'{"id": "torn')
        seen: list[int] = []
        progress = table_run(redis_url, source, target, on_progress=lambda now: seen.append(now.num_done)).run()
    assert seen[0] == 15 and (progress.num_done, progress.num_failed) == (40, 0)
    assert len(asked) == len(set(asked)) == 40
    found = [json.loads(line) for line in target.read_text().splitlines()] if suffix == "jsonl" else rows(target)
    assert [row["response"] for row in found] == [f"say word {number} " for number in range(40)]
    assert not journal.exists() and len(list(tmp_path.iterdir())) == 2


def test_a_run_killed_between_its_output_and_the_end_of_its_journal_ends_well(
    redis_url: str, worker: FakeWorker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = tmp_path / "in.csv", tmp_path / "out.csv"
    write_rows(source, 5)

    def die(progress: BatchProgress) -> int:
        raise KeyboardInterrupt

    with worker.serving(echo):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(BatchProgress, "num_retryable", property(die))
            table_run(redis_url, source, target).run()
        written = target.read_bytes()
        assert table_run(redis_url, source, target).run().num_done == 5
    assert target.read_bytes() == written
    assert len(list(tmp_path.iterdir())) == 2


def test_a_journal_without_an_answer_holds_nobody_up(redis_url: str, worker: FakeWorker, tmp_path: Path) -> None:
    """As a run of other options leaves one that was killed early."""
    source, target = tmp_path / "in.csv", tmp_path / "out.csv"
    write_rows(source, 1)
    target.with_name("out.csv.journal").write_text('{"custom_id": null, "digest": "of something else"}\n')
    with worker.serving(echo):
        assert table_run(redis_url, source, target).run().num_failed == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.csv", "out.csv"]


def test_a_journal_of_something_else_is_refused(redis_url: str, worker: FakeWorker, tmp_path: Path) -> None:
    source, target = tmp_path / "in.csv", tmp_path / "out.csv"
    write_rows(source, 3)

    def interrupt(progress: BatchProgress) -> None:
        if progress.num_done:
            raise KeyboardInterrupt

    with worker.serving(echo), pytest.raises(KeyboardInterrupt):
        table_run(redis_url, source, target, on_progress=interrupt).run()
    journal = target.with_name("out.csv.journal").read_bytes()
    for changed in ({"prompt": "tell {text}"}, {"fields": {"temperature": 0}}, {"run_id": "2"}):
        with pytest.raises(BatchFileError, match=r"out\.csv\.journal holds the answers to another input"):
            table_run(redis_url, source, target, **changed).run()
    assert target.with_name("out.csv.journal").read_bytes() == journal


def test_two_runs_into_one_output_are_refused(redis_url: str, worker: FakeWorker, tmp_path: Path) -> None:
    source, target = tmp_path / "in.csv", tmp_path / "out.csv"
    write_rows(source, 3)
    refused: list[str] = []

    def run_again(progress: BatchProgress) -> None:
        if not refused:
            with pytest.raises(BatchFileError, match="another `promptmill run` writes") as error:
                table_run(redis_url, source, target).run()
            refused.append(str(error.value))

    with worker.serving(echo):
        assert table_run(redis_url, source, target, on_progress=run_again).run().num_done == 3
    assert refused and len(rows(target)) == 3


def test_what_is_wrong_is_said_before_anything_is_asked(redis_url: str, tmp_path: Path) -> None:
    source, target = tmp_path / "in.csv", tmp_path / "out.csv"
    write_rows(source, 3)
    with pytest.raises(InvalidJobError, match=r"there is no column 'texts'.*the columns are: text"):
        table_run(redis_url, source, target, prompt="{texts}")
    with pytest.raises(InvalidJobError, match="--system: there is no column"):
        table_run(redis_url, source, target, system="{role}")
    with pytest.raises(InvalidJobError, match="temperature: must be at most 2"):
        table_run(redis_url, source, target, fields={"temperature": 9})
    with pytest.raises(BatchFileError, match="is the input as well"):
        table_run(redis_url, source, source)
    with pytest.raises(BatchFileError, match="nowhere"):
        table_run(redis_url, source, tmp_path / "nowhere" / "out.csv").run()
    target.write_text("mine")
    with pytest.raises(BatchFileError, match="exists already; remove it"):
        table_run(redis_url, source, target)
    assert target.read_text() == "mine"
    (tmp_path / "again.csv").write_text("text,response\na,b\n")
    with pytest.raises(InvalidJobError, match="--prefix: the input has a column 'response'"):
        table_run(redis_url, tmp_path / "again.csv", tmp_path / "out2.csv")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.csv", "in.csv", "out.csv"]


def test_flags_that_do_not_go_with_the_files_are_refused(promptmill: Invoke, tmp_path: Path) -> None:
    table, lines = tmp_path / "in.csv", tmp_path / "in.jsonl"
    write_rows(table, 1)
    lines.write_text("{}\n")

    def refused(*arguments: object) -> str:
        result = promptmill("run", *arguments)
        assert result.exit_code == 2, result.output
        return result.stderr

    assert "--prompt 'Summarise: {text}'" in refused(table, tmp_path / "out.csv")
    assert "are a .jsonl file" in refused(lines, tmp_path / "out.csv")
    assert "- is not one" in refused(lines, "-")
    assert "leave out --retry-failed" in refused(lines, tmp_path / "out.jsonl", "--cancel", "--retry-failed")
    assert "--max-tokens goes with --prompt" in refused(lines, tmp_path / "out.jsonl", "--max-tokens", 3)
    assert "--embed goes with --prompt" in refused(lines, tmp_path / "out.jsonl", "--embed")
    assert "--null goes with --prompt" in refused(lines, tmp_path / "out.jsonl", "--null", "x")
    assert "a table is a .csv" in refused(lines, tmp_path / "out.jsonl", "--prompt", "{text}")
    assert "leave out --raw" in refused(table, tmp_path / "out.csv", "--prompt", "x", "--raw", "--system", "y")


def test_ctrl_c_and_kill_9_lose_nothing_and_ask_nothing_twice(
    redis_url: str, worker: FakeWorker, tmp_path: Path
) -> None:
    source, target = tmp_path / "in.csv", tmp_path / "out.parquet"
    journal = target.with_name("out.parquet.journal")
    write_rows(source, 300)
    command = [sys.executable, "-m", "producer", "run", str(source), str(target), "--prompt", "say {text}"]
    command += ["--max-in-flight", "32"]  # so many are answered while nobody runs: the next end finds a run
    environment = {**os.environ, "PROMPTMILL_REDIS_URL": redis_url}
    asked: list[str] = []
    running: list[StartedProcess] = []
    ends = {80: signal.SIGINT, 160: signal.SIGKILL, 240: signal.SIGKILL}

    def strike(held: HeldJob) -> None:
        asked.append(held.job_id)
        echo(held)
        if (end := ends.get(len(asked))) is not None:
            running[-1].send_signal(end)
            running[-1].wait(60)

    exit_codes = []
    with worker.serving(strike):
        for _ in range(len(ends) + 1):
            running.append(StartedProcess(command, env=environment, stderr=subprocess.DEVNULL))
            exit_codes.append(running[-1].wait(120))
            assert target.exists() or journal.exists()
    assert exit_codes == [130, -9, -9, 0]
    assert len(asked) == len(set(asked)) == 300
    assert [row["response"] for row in rows(target)] == [f"say word {number} " for number in range(300)]
    assert not journal.exists()
