"""`promptmill worker --tensor-parallel-size`: one worker, several processes, which all end with it."""

import os
import signal
from pathlib import Path

import pytest

from producer import Client
from tests.acceptance.system import System
from tests.fakes.processes import children_of, wait_until_gone
from tests.fakes.tiny_models import make_tiny_model

pytestmark = pytest.mark.timeout(600)


def test_a_worker_over_two_ranks_serves_jobs_and_leaves_nobody_behind_when_it_is_killed(
    system: System, tmp_path: Path
) -> None:
    folder = make_tiny_model("llama", tmp_path / "model")
    worker = system.start_worker(
        *("--model", str(folder), "--model-names", "tiny", "--device", "cpu", "--tensor-parallel-size", "2")
    )
    with Client(system.url) as client:
        (info,) = client.workers()
        assert info.device == "cpu x2"
        job = client.submit([5, 6, 7], model="tiny", max_tokens=20, temperature=0.0)
        assert job.result(timeout=60).usage.completion_tokens > 0
    below = descendants(worker.pid)
    assert sum("engine.parallel.follower" in command_of(pid) for pid in below) == 1
    os.kill(worker.pid, signal.SIGKILL)
    for pid in below:
        wait_until_gone(pid)


def descendants(pid: int) -> list[int]:
    return [below for child in children_of(pid) for below in (child, *descendants(child))]


def command_of(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
