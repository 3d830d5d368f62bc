"""The child process and its supervision: deaths, hangs, failing starts, with an echoing core in a real process."""

import logging
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from engine import EngineDiedError, InferenceEngine, SamplingParams
from engine.outputs import RequestOutput
from engine.process import ChildProcess
from tests.fakes.echo_engines import (
    ENDLESS,
    POISON,
    SOUND,
    DeathWatch,
    child_pid,
    echo,
    process_engine,
    wait_for_restarts,
)
from tests.fakes.modelless_core import MODELLESS_CORE_PATH, RAISING_PROMPT
from tests.fakes.output_recorder import OutputRecorder
from tests.fakes.tiny_tokenizers import write_tokenizer
from tests.fakes.waiting import wait_until

NUM_KILLS = 10

pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[InferenceEngine]:
    with process_engine(tmp_path, step_seconds=0.001) as engine:
        yield engine


@pytest.fixture
def death_watch() -> Iterator[DeathWatch]:
    watch = DeathWatch()
    log = logging.getLogger("engine.supervisor")
    log.addHandler(watch)
    yield watch
    log.removeHandler(watch)


def test_the_core_runs_in_a_process_of_its_own(engine: InferenceEngine) -> None:
    assert engine.generate("hello world", SamplingParams(max_tokens=2)) != ""
    assert child_pid(engine) != os.getpid()


def test_a_child_killed_in_mid_generation_leaves_no_gap_and_no_repeat(engine: InferenceEngine) -> None:
    prompts = {f"job-{i}": [SOUND + i, 20, 30, 40] for i in range(4)}
    recorders = {name: OutputRecorder() for name in prompts}
    for name, prompt in prompts.items():
        engine.submit(name, prompt, SamplingParams(max_tokens=500), on_output=recorders[name])
    for round_number in (1, 2, 3, 4):
        for recorder in recorders.values():
            recorder.wait_for_tokens(60 * round_number)
        os.kill(child_pid(engine), signal.SIGKILL)
        wait_for_restarts(engine, round_number)
    for name, recorder in recorders.items():
        last = recorder.wait_for_end()
        assert last.finish_reason == "length"
        assert recorder.token_ids == echo(prompts[name], 500)
        offsets = [output.token_offset for output in recorder.outputs if output.token_ids]
        assert offsets == list(range(500))
    assert engine.is_healthy


def test_fifty_requests_survive_many_kills_with_the_tokens_of_the_undisturbed_run(tmp_path: Path) -> None:
    rng = random.Random(4)
    roots = [[rng.randrange(200) for _ in range(60)] for _ in range(3)]
    prompts = [[*rng.choice(roots)[: rng.randint(1, 60)], rng.randrange(200)] for _ in range(50)]
    params = [SamplingParams(max_tokens=rng.randint(5, 80), n=rng.choice([1, 1, 3]), seed=i) for i in range(50)]
    sizes: dict[str, Any] = {"max_num_seqs": 8, "max_num_tokens": 32, "block_size": 8}
    folder = str(write_tokenizer(tmp_path))
    with InferenceEngine(folder, _start_child=partial(ChildProcess, core_path=MODELLESS_CORE_PATH), **sizes) as engine:
        undisturbed = [(o.text, o.token_ids, o.finish_reason) for o in engine.generate_batch(prompts, params)]
        assert engine.get_stats()["num_preemptions"] > 0
        num_tokens = sum(len(token_ids) for _, token_ids, _ in undisturbed)
        everything = OutputRecorder()
        recorders = [OutputRecorder() for _ in prompts]
        for prompt, sampling, recorder in zip(prompts, params, recorders, strict=True):
            tee = partial(_call_both, everything, recorder)
            engine.submit(f"job-{len(prompt)}-{sampling.seed}", prompt, sampling, on_output=tee)
        for kill in range(NUM_KILLS):  # from the first prefill to the last few tokens
            everything.wait_for_count(1 + kill * num_tokens // NUM_KILLS)
            os.kill(child_pid(engine), signal.SIGKILL)
            wait_for_restarts(engine, kill + 1)
        for recorder in recorders:
            recorder.wait_for_end()
        assert engine.get_stats()["num_kv_blocks_used"] == 0
    answers = [
        [output for output in recorder.outputs if output.index == index]
        for recorder, sampling in zip(recorders, params, strict=True)
        for index in range(sampling.n)
    ]
    found = [("".join(o.text for o in a), [t for o in a for t in o.token_ids], a[-1].finish_reason) for a in answers]
    assert found == undisturbed


def _call_both(first: OutputRecorder, second: OutputRecorder, output: RequestOutput) -> None:
    first(output)
    second(output)


@pytest.mark.parametrize("prompt", [None, [SOUND], [POISON]], ids=["idle", "decoding", "in a step that hangs"])
def test_a_death_is_seen_at_once_with_its_reason(
    tmp_path: Path, death_watch: DeathWatch, prompt: list[int] | None
) -> None:
    """By the end of the pipe: no clock of ours runs for less than minutes here."""
    with process_engine(tmp_path, step_seconds=0.001, hung_by=POISON) as engine:
        recorder = OutputRecorder()
        if prompt is not None:
            engine.submit("job-1", prompt, ENDLESS, on_output=recorder)
        if prompt == [SOUND]:
            recorder.wait_for_tokens(1)
        if prompt == [POISON]:
            wait_until((tmp_path / "hangs").exists)
        killed_at = time.monotonic()
        os.kill(child_pid(engine), signal.SIGKILL)
        assert death_watch.seen.wait(60)
        assert death_watch.seen_at - killed_at < 30.0
        assert "killed by SIGKILL" in death_watch.report
        if prompt is not None:
            recorder.wait_for_tokens(100)
            assert set(recorder.token_ids) == set(prompt)


def test_a_request_that_makes_the_model_raise_fails_alone_and_the_child_lives(tmp_path: Path) -> None:
    folder = str(write_tokenizer(tmp_path))
    prompts = [[1, 2, 3], RAISING_PROMPT, [6] * 20]
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    recorders = [OutputRecorder() for _ in prompts]
    with InferenceEngine(
        folder, _start_child=partial(ChildProcess, core_path=MODELLESS_CORE_PATH), max_num_seqs=8, max_num_tokens=64
    ) as engine:
        pid = child_pid(engine)
        for i, recorder in enumerate(recorders):
            engine.submit(f"job-{i}", prompts[i], params, on_output=recorder)
        first, failed, third = (recorder.wait_for_end() for recorder in recorders)
        assert (first.finish_reason, third.finish_reason) == ("length", "length")
        assert failed.finish_reason == "error" and "makes the model raise" in str(failed.error)
        assert child_pid(engine) == pid and engine.get_stats()["num_restarts"] == 0


@pytest.mark.parametrize("is_seen", [False, True], ids=["as it dies", "while another starts"])
def test_a_request_submitted_while_the_child_is_away_runs_when_it_is_back(
    engine: InferenceEngine, is_seen: bool
) -> None:
    os.kill(child_pid(engine), signal.SIGKILL)
    if is_seen:
        wait_for_restarts(engine, 1)
    assert engine.generate([SOUND, 20], SamplingParams(max_tokens=2)) == engine.tokenizer.decode([SOUND, 20])


def test_a_request_that_kills_the_child_fails_and_the_others_go_on(tmp_path: Path) -> None:
    recorders = {name: OutputRecorder() for name in ("early", "poison", "late")}
    with process_engine(tmp_path, killed_by=POISON) as engine:
        for name, recorder in recorders.items():
            prompt = [POISON if name == "poison" else SOUND, 20]
            engine.submit(name, prompt, SamplingParams(max_tokens=40), on_output=recorder)
        failed = recorders["poison"].wait_for_end()
        assert (failed.finish_reason, failed.error_kind) == ("error", "poison")
        assert failed.error is not None
        assert "killed by SIGKILL" in failed.error
        assert "about to be killed" in failed.error
        for name in ("early", "late"):
            assert recorders[name].wait_for_end().finish_reason == "length"
            assert recorders[name].token_ids == echo([SOUND, 20], 40)
        with pytest.raises(EngineDiedError, match="died 3 times in a row"):
            engine.generate([POISON], ENDLESS)
        assert engine.is_healthy


def test_a_request_that_survives_the_second_death_completes(tmp_path: Path) -> None:
    with process_engine(tmp_path, killed_by=POISON, killed_at=5, max_deaths=2) as engine:
        (output,) = engine.generate_batch([[POISON, 20]], SamplingParams(max_tokens=12))
        assert output.token_ids == echo([POISON, 20], 12)
        assert engine.get_stats()["num_restarts"] == 2


def test_a_step_that_raises_ends_the_child_with_its_reason(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with process_engine(tmp_path, broken_by=POISON) as engine:
        (output,) = engine.generate_batch([[POISON]], ENDLESS)
    assert output.error is not None
    assert "RuntimeError: the device is broken" in output.error
    said = [record.getMessage() for record in caplog.records if record.name == "engine.process"]
    assert any(line.startswith("Traceback") for line in said)  # each line an event, in the layout of all others
    assert not any("\n" in line for line in said)


@pytest.mark.parametrize(
    ("how", "report"),
    [
        ("hung_by", "sent nothing within step_timeout_seconds (1.5 s) and was killed"),
        ("stopped_by", "stopped in the middle of a message, for 1.5 s, and was killed"),
    ],
)
def test_a_child_that_hangs_is_killed_and_its_requests_go_on(
    tmp_path: Path, death_watch: DeathWatch, how: str, report: str
) -> None:
    with process_engine(tmp_path, {"step_timeout_seconds": 1.5}, **{how: POISON}) as engine:
        (output,) = engine.generate_batch([[POISON, 20]], SamplingParams(max_tokens=6))
        assert output.token_ids == echo([POISON, 20], 6)
        assert engine.get_stats()["num_restarts"] >= 1
    assert report in death_watch.report


def test_an_idle_child_is_not_taken_for_a_hung_one(tmp_path: Path) -> None:
    with process_engine(tmp_path, {"step_timeout_seconds": 0.05}) as engine:
        pid = child_pid(engine)
        threading.Event().wait(0.3)
        assert child_pid(engine) == pid


def test_a_stopped_process_is_killed_as_hung(tmp_path: Path) -> None:
    """SIGSTOP: it reads nothing, so what we send must not block us either."""
    with process_engine(tmp_path, {"step_timeout_seconds": 1.5}) as engine:
        os.kill(child_pid(engine), signal.SIGSTOP)
        prompts = [[SOUND] * 50_000 for _ in range(20)]  # far more than the pipe holds
        outputs = engine.generate_batch(prompts, SamplingParams(max_tokens=3))
        assert [output.token_ids for output in outputs] == [[SOUND] * 3] * 20
        assert engine.get_stats()["num_restarts"] >= 1
