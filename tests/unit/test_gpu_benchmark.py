"""The GPU benchmark: its limits by hand, its stages, and one run of the whole in small under Triton's interpreter."""

import importlib.util
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from benchmarks import gpu_stages
from benchmarks.gpu_models import DeviceLimits, ModelSize, least_seconds
from benchmarks.gpu_race import gap_shares, measure
from benchmarks.gpu_stages import StageJournal, end_with_all, run_apart, run_here
from benchmarks.workload import Workload

ROOT = Path(__file__).parents[2]
SIZE = ModelSize("unit", "qwen3", 1, 1, 1, 1, 1, 1, 1, True)


def test_the_first_call_tells_how_fast_and_how_right_the_engine_is() -> None:
    pytest.importorskip("triton")
    from benchmarks.gpu_work import Settings, stages_of

    settings = Settings(("A", "B"), (256, 1), (256,), ("transformers", "vllm"), 0, Path(), is_smoke=False)
    with pytest.MonkeyPatch.context() as patched:
        sizes = {name: ModelSize(name, "qwen3", 1, 1, 1, 1, 1, 1, 1, True) for name in "AB"}
        patched.setattr("benchmarks.gpu_work.SIZES", sizes)
        names = stages_of(settings)
    assert names[:13] == [
        "limits",
        "weights: A",
        "engine checks: A",
        "race: A: promptmill",
        "weights: B",
        "race: B: promptmill",
        "kernels: A",
        "race: A: promptmill: more",
        "idle: A",
        "first run: A",
        "first job: A",
        "race: A: promptmill, deterministic",
        "race: A: promptmill, 8192 a step",
    ]
    assert len(names) == len(set(names)), "each stage is one entry of the journal"
    assert names[-2:] == ["race: A: vllm", "race: B: vllm"]


def test_the_limit_is_the_prefill_and_every_step_of_all_sequences() -> None:
    limits = DeviceLimits(bytes_a_second=10.0, flops_a_second=1000.0)
    assert (SIZE.num_layer_weights, SIZE.num_weights, SIZE.kv_bytes) == (7, 8, 4)
    prefill = (2 * 7 * 5 + 2 * (3**2 + 2**2)) / 1000
    steps = [16 / 10 + (4 + 3) * 4 / 10, 16 / 10 + 4 * 4 / 10]  # the first sequence ends after its second token
    assert least_seconds(SIZE, Workload([[1] * 3, [1] * 2], [2, 3]), limits) == pytest.approx(prefill + sum(steps))


def stage_command(journal: Path, code: str) -> list[str]:
    """A stage named `a` that finds 1 and then runs the code."""
    lines = [
        "from pathlib import Path",
        "from benchmarks.gpu_stages import StageJournal, run_here",
        f"journal = StageJournal(Path({str(journal)!r}))",
        "def run():",
        "    journal.add('a', kind='number', value=1)",
        f"    {code}",
        "run_here('a', run, journal)",
    ]
    return [sys.executable, "-c", "\n".join(lines)]


@pytest.mark.parametrize(
    ("code", "outcome"),
    [
        ("pass", "done"),
        ("raise ValueError('no such kernel')", "ValueError: no such kernel"),
        ("import os; os.abort()", "its process ended with exit code -6"),
    ],
)
def test_a_stage_that_fails_or_crashes_keeps_what_it_found(
    code: str, outcome: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    path = tmp_path / "journal"
    journal = StageJournal(path)
    assert run_apart("a", stage_command(path, code), journal, until=float("inf"))
    assert journal.outcomes == {"a": outcome} and StageJournal(path).outcomes == journal.outcomes
    assert journal.findings("number") == [{"kind": "number", "value": 1}]


HANGING = [sys.executable, "-c", "import signal; signal.pause()"]


def test_a_stage_that_hangs_is_ended_and_not_begun_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_stages, "LEAST_SECONDS", 1)
    journal = StageJournal(tmp_path / "journal")
    journal.add("a", kind="number", value=1)
    assert run_apart("a", HANGING, journal, until=float("inf"), limit=1)
    assert journal.outcomes == {"a": "it took more than 1 s"} and len(journal.findings("number")) == 1


def test_what_a_stage_started_ends_with_it_in_a_session_of_its_own_too() -> None:
    peer = [sys.executable, "-c", "print(flush=True); import signal; signal.pause()"]
    code = f"import subprocess; subprocess.Popen({peer!r}, start_new_session=True).wait()"
    stage = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True)
    assert stage.stdout is not None and stage.stdout.readline() == b"\n", "the peer runs"
    end_with_all(stage)
    assert stage.stdout.read() == b"", "nobody holds the other end"
    stage.stdout.close()


def test_a_stage_that_a_calls_end_cuts_off_is_begun_again_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_stages, "LEAST_SECONDS", 0)
    monkeypatch.chdir(ROOT)
    path = tmp_path / "journal"
    journal = StageJournal(path)
    journal.add("a", kind="number", value=0)
    assert not run_apart("a", HANGING, journal, until=time.monotonic() + 1)
    assert journal.outcomes == {} and journal.findings("number") == [{"kind": "number", "value": 0}]
    assert not run_apart("a", HANGING, journal, until=time.monotonic() - 1), "there is no time to begin it"
    assert run_apart("a", stage_command(path, "pass"), journal, until=float("inf"))
    assert journal.outcomes == {"a": "done"}
    assert journal.findings("number") == [{"kind": "number", "value": 1}], "the first try is forgotten"


def test_a_journal_in_memory_has_what_stages_in_this_process_find() -> None:
    journal = StageJournal(None)
    run_here("a", lambda: journal.add("a", kind="number", value=2), journal)
    assert journal.findings("number")[0]["value"] == 2 and journal.outcomes == {"a": "done"}
    journal.end("b", "it took more than 300 s")
    assert [journal.is_settled(stage, again=False) for stage in "abc"] == [True, True, False]
    assert [journal.is_settled(stage, again=True) for stage in "abc"] == [True, False, False]


def test_a_journal_keeps_the_findings_of_two_devices_apart(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    for number, device in enumerate(("H100", "H200")):
        journal = StageJournal(path, device)
        assert not journal.is_settled("a", again=False), "what another device found says nothing of this one"
        run_here("a", partial(journal.add, "a", kind="n", value=number), journal)
    assert [StageJournal(path, device).findings("n")[0]["value"] for device in ("H100", "H200")] == [0, 1]
    assert StageJournal(path, "H100").outcomes == {"a": "done"}


def test_the_tiles_that_are_tried_are_changes_of_what_the_backend_has() -> None:
    pytest.importorskip("triton")
    from benchmarks.gpu_tiles import _DECODE_CHANGES, _PREFILL_CHANGES
    from engine.attention import triton_backend

    names = {name for changes in (*_DECODE_CHANGES, *_PREFILL_CHANGES) for name in changes}
    assert names and names <= set(vars(triton_backend))


def test_a_contenders_third_run_is_told_and_a_long_one_is_not_repeated() -> None:
    """A slow peer's three runs would take more than a stage has, and nothing of them would be known."""

    class Slow:
        def __init__(self, *seconds: float) -> None:
            self.left = list(seconds)

        def run(self, workload: Workload) -> dict[str, object]:
            return {"seconds": self.left.pop(0), "counts": workload.max_tokens}

    load = Workload([[1], [2]], [3, 4])
    told = [next(measure(Slow(1.0, *seconds), [load], 200)) for seconds in ((9.0, 8.0, 7.0), (70.0,), (9.0, 61.0))]
    assert [(run["seconds"], first) for run, first in told] == [(7.0, 9.0), (70.0, 70.0), (61.0, 9.0)]


def test_a_device_is_idle_between_spans_that_may_lie_in_each_other() -> None:
    spans = [(100.0, 140.0), (0.0, 40.0), (10.0, 20.0), (42.0, 80.0)]
    assert gap_shares(spans) == (22 / 140, 20 / 140)
    assert gap_shares([(5.0, 6.0)]) == (0.0, 0.0)


def test_where_the_queues_packages_are_missing_its_stage_alone_is_left_out(tmp_path: Path) -> None:
    """A machine with a GPU may have torch, Triton and transformers, and nothing else of ours."""
    code = """
import sys
from pathlib import Path

for name in ("redis", "rq", "pydantic", "llguidance", "boto3", "gguf", "hiredis", "jinja2"):
    sys.modules[name] = None  # as if it were not installed
import torch
from benchmarks.gpu_report import report
from benchmarks.gpu_race import RaceSettings, queued
from benchmarks.peer_environment import PeerError
import engine.core, engine.runner.model_runner, engine.child
try:
    queued(RaceSettings(Path(), torch.device("cpu"), True)).__enter__()
except PeerError as error:
    print(error)
"""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("there is no Triton")
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False, timeout=200
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.startswith("the queue needs packages that are not here: import of redis")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="there is no Triton")
@pytest.mark.timeout(600)
def test_the_whole_benchmark_runs_in_small_on_a_cpu() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--smoke", "--peers", "nobody"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "differ" not in result.stdout and "| tiny, sampler " in result.stdout
    assert "promptmill, queued" in result.stdout
    assert "race: tiny: nobody: PeerError: not installed in this environment" in result.stdout
    assert "kernel checks: tiny: " not in result.stdout and "cuBLASLt without split-K" in result.stdout
    assert "decode attention" in result.stdout and "smoke run: no result is kept" in result.stdout
