"""When an engine calls back, and says that it has called back all there was: behind a step, and behind its own end."""

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from engine import InferenceEngine
from engine.config import EngineConfig
from engine.messages import FinishCode, StepOutput
from engine.outputs import RequestOutput
from engine.supervisor import Supervisor
from tests.fakes.echo_engines import ENDLESS, echo_engine
from tests.fakes.output_recorder import OutputRecorder
from tests.fakes.played_child import Children
from tests.fakes.request_tables import make_request


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[InferenceEngine]:
    with echo_engine(tmp_path) as engine:
        yield engine


def test_all_outputs_of_a_step_are_called_back_before() -> None:
    order: list[str] = []
    heard = threading.Event()

    def note(output: RequestOutput) -> None:
        order.append(output.request_id)

    def after_outputs() -> None:
        if order:
            order.append("after")
            heard.set()

    children = Children()
    supervisor = Supervisor(EngineConfig(model_path=""), children, after_outputs)
    supervisor.launch()
    supervisor.wait_until_ready()
    child = children.next()
    for name in ("one", "two"):
        supervisor.submit(make_request(name, on_output=note))
        child.is_told()
    child.say(StepOutput(np.array([0, 1]), np.array([5, 6], np.int32), np.zeros(2, np.int8)))
    assert heard.wait(60)
    assert order == ["one", "two", "after"]
    supervisor.stop()


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


def step(token_id: int, code: FinishCode = FinishCode.NONE) -> StepOutput:
    return StepOutput.of_tokens(0, [token_id], [code])


@pytest.mark.parametrize("interval", [0.01, 1000.0])
def test_tokens_wait_for_no_longer_than_the_interval_and_an_end_does_not_wait(interval: float) -> None:
    children = Children()
    supervisor = Supervisor(EngineConfig(model_path=""), children, output_interval=lambda: interval)
    supervisor.launch()
    supervisor.wait_until_ready()
    child, recorder = children.next(), OutputRecorder()
    supervisor.submit(make_request("r", on_output=recorder))
    child.is_told()
    child.say(step(5))
    recorder.wait_for_tokens(1)  # before it there was no delivery
    child.say(step(6))
    if interval < 1:
        recorder.wait_for_tokens(2)
    child.say(step(7))
    child.say(step(8, FinishCode.LENGTH))
    recorder.wait_for_tokens(4)
    if interval > 1:
        assert [output.token_ids for output in recorder.outputs] == [[5], [6, 7, 8]]
    supervisor.stop()
