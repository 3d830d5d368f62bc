"""When an engine says that it has called back all there was: behind each step, and behind its own end."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine import InferenceEngine, SamplingParams
from engine.outputs import RequestOutput
from tests.fakes.echo_engines import ENDLESS, echo_engine
from tests.fakes.output_recorder import OutputRecorder


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[InferenceEngine]:
    with echo_engine(tmp_path) as engine:
        yield engine


def test_all_outputs_of_a_step_are_called_back_before(engine: InferenceEngine) -> None:
    steps: list[list[int]] = []
    step: list[int] = []
    ended = threading.Event()

    def on_output(output: RequestOutput) -> None:
        step.append(output.index)
        if output.finished:
            ended.set()

    def after_outputs() -> None:
        if step:
            steps.append(step.copy())
            step.clear()

    engine.after_outputs = after_outputs
    engine.submit("job-1", [5], SamplingParams(n=3, max_tokens=4), on_output=on_output)
    assert ended.wait(60)
    engine.stop()
    assert steps == [[0, 1, 2]] * 4


def test_what_the_end_of_the_engine_calls_back_is_followed_too(engine: InferenceEngine) -> None:
    order: list[str] = []
    recorder = OutputRecorder()

    def on_output(output: RequestOutput) -> None:
        order.append(output.error_kind or "token")
        recorder(output)

    engine.after_outputs = lambda: order.append("after")
    engine.submit("job-1", [5], ENDLESS, on_output=on_output)
    recorder.wait_for_tokens(1)
    engine.stop()
    assert order[-2:] == ["stopped", "after"]
