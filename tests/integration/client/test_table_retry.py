"""`promptmill run --retry-failed` on a table: the rows that failed are asked again."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from producer import BatchFileError
from producer.contract import ErrorCode, ErrorInfo
from tests.fakes.command_line import Invoke
from tests.fakes.fake_worker import FakeWorker
from tests.fakes.held_job import HeldJob
from tests.integration.client.test_batch_retry import Moody
from tests.integration.client.test_table_run import rows, table_run


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_rows_that_failed_are_asked_again_and_the_output_is_written_anew(
    redis_url: str, worker: FakeWorker, tmp_path: Path, suffix: str
) -> None:
    source, target = tmp_path / "in.csv", tmp_path / f"out.{suffix}"
    journal = target.with_name(target.name + ".journal")
    source.write_text("text\nword 0\nword 1\n\nshort,short\nword 3\n")
    moody = Moody()

    def outcome() -> list[tuple[str, str]]:
        found = [json.loads(line) for line in target.read_text().splitlines()] if suffix == "jsonl" else rows(target)
        return [(row["response"] or "", (row["error"] or "").partition(":")[0]) for row in found]

    with worker.serving(moody):
        table_run(redis_url, source, target, prompt="{text}").run()
        failed, bad, good = ("", "engine_error"), ("", "invalid_row"), ("word 1 ", "")
        assert outcome() == [failed, good, bad, failed] and journal.exists()
        moody.is_good = True
        moody.asked.clear()
        progress = table_run(redis_url, source, target, prompt="{text}", retries_failed=True).run()
    assert (progress.num_done, progress.num_failed, progress.num_retryable) == (4, 1, 0)
    assert sorted(moody.asked) == ["word 0", "word 3"]
    assert outcome() == [("word 0 ", ""), good, bad, ("word 3 ", "")] and not journal.exists()
    with pytest.raises(BatchFileError, match="exists already, with no failed row that could be asked again"):
        table_run(redis_url, source, target, prompt="{text}", retries_failed=True)


def test_a_retry_of_another_table_is_refused(redis_url: str, worker: FakeWorker, tmp_path: Path) -> None:
    source, target = tmp_path / "in.csv", tmp_path / "out.csv"
    source.write_text("text\nword 0\n")
    with worker.serving(Moody()):
        table_run(redis_url, source, target, prompt="{text}").run()
        before = target.read_bytes()
        with pytest.raises(BatchFileError, match="holds the answers to another input"):
            table_run(redis_url, source, target, prompt="tell {text}", retries_failed=True).run()
    assert target.read_bytes() == before


def test_rows_with_a_null_cell_are_asked_alone_once_a_text_stands_for_it(
    promptmill: Invoke, worker: FakeWorker, tmp_path: Path
) -> None:
    source, target = tmp_path / "in.parquet", tmp_path / "out.csv"
    pq.write_table(pa.table({"text": ["word 1", None, "word 2", None]}), source)
    moody = Moody()

    def told(*flags: str) -> tuple[int, str]:
        done = promptmill("run", source, target, "--prompt", "{text}", *flags)
        return done.exit_code, done.stderr

    with worker.serving(moody):
        code, said = told()
        assert code == 1 and "2 rows have a null cell, and fail; the same command with --null TEXT" in said
        assert "--retry-failed" not in said and sorted(moody.asked) == ["word 1", "word 2"]
        assert told("--null", "word 3")[0] == 1  # they are asked, and fail
        assert "answers another input" in told("--null", "word 4")[1]  # those are answers to word 3
        code, said = told("--null", "word 3", "--retry-failed")
        moody.is_good = True
        code, said = told("--null", "word 3", "--retry-failed")
    assert code == 0 and "4 answered, 0 failed" in said and "null cell" not in said
    assert sorted(moody.asked) == ["word 1", "word 2", *["word 3"] * 6]
    assert [row["response"] for row in rows(target)] == ["word 1 ", "word 3 ", "word 2 ", "word 3 "]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.parquet", "out.csv"]


def test_a_row_that_the_worker_refuses_has_the_reason(redis_url: str, worker: FakeWorker, tmp_path: Path) -> None:
    source, target = tmp_path / "in.csv", tmp_path / "out.csv"
    source.write_text("text\nword 0\n")
    too_long = ErrorInfo(code=ErrorCode.CONTEXT_LENGTH_EXCEEDED, message="prompt: is too long")

    def refuse(held: HeldJob) -> None:
        held.begin().end("failed", error=too_long)

    with worker.serving(refuse):
        table_run(redis_url, source, target, prompt="{text}").run()
    [row] = rows(target)
    assert (row["response"], row["error"]) == ("", "context_length_exceeded: prompt: is too long")
