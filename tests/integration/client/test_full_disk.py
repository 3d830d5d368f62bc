"""`promptmill run` where the output's disk is full: a limit on the size of files stands for it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fakes.fake_worker import FakeWorker, echo

LIMITED_RUN = """
import resource, sys
import producer.commands.run, producer.tables.run
from producer import cli
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(1)), resource.RLIM_INFINITY))
cli.main()
"""


def run(redis_url: str, max_file_bytes: int, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", LIMITED_RUN, str(max_file_bytes), "run", *arguments],
        env={**os.environ, "PROMPTMILL_REDIS_URL": redis_url},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    ("name", "max_file_bytes"),
    [("jsonl", 1000), ("csv", 100), ("csv", 1000)],
    ids=["an answer", "a table's questions", "a table's answer"],
)
def test_a_run_that_finds_no_room_says_so_and_goes_on_later(
    redis_url: str, worker: FakeWorker, tmp_path: Path, name: str, max_file_bytes: int
) -> None:
    source, target = tmp_path / f"in.{name}", tmp_path / f"out.{name}"
    if name == "jsonl":
        lines = [{"custom_id": str(i), "url": "/v1/completions", "body": {"prompt": f"p{i}"}} for i in range(5)]
        source.write_text("".join(json.dumps(line) + "\n" for line in lines))
        arguments = [str(source), str(target)]
    else:
        source.write_text("text\np0\np1\np2\np3\np4\n")
        arguments = [str(source), str(target), "--prompt", "{text}", "--raw"]
    with worker.serving(echo):
        full = run(redis_url, max_file_bytes, *arguments)
        assert full.returncode == 2 and "Traceback" not in full.stderr
        assert f"Error: output {target}" in full.stderr and "cannot be written: File too large" in full.stderr
        again = run(redis_url, 1 << 20, *arguments)
    assert (again.returncode, "5 answered, 0 failed" in again.stderr) == (0, True), again.stderr
    assert len(target.read_text().splitlines()) == 5 + (name == "csv")
