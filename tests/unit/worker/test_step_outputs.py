"""A step's outputs on their way to the loop: one event, however many there are."""

from collections.abc import Callable
from typing import Any, cast

import pytest

from engine.outputs import RequestOutput
from tests.fakes.fake_engine import FakeEngine
from worker.running_job import RunningJob
from worker.step_outputs import COALESCE_SECONDS, StepOutputs


def job(name: str) -> RunningJob:
    return cast(RunningJob, name)


def output(token_id: int) -> RequestOutput:
    return cast(RequestOutput, token_id)


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def posted() -> list[Callable[[], None]]:
    return []


@pytest.fixture
def taken() -> list[tuple[Any, Any]]:
    return []


@pytest.fixture
def outputs(engine: FakeEngine, posted: list[Callable[[], None]], taken: list[tuple[Any, Any]]) -> StepOutputs:
    return StepOutputs(engine, post=posted.append, take=lambda *pair: taken.append(pair))  # type: ignore[arg-type]


def test_a_step_is_one_event_in_the_order_of_its_outputs(
    engine: FakeEngine, outputs: StepOutputs, posted: list[Callable[[], None]], taken: list[tuple[Any, Any]]
) -> None:
    for token_id, name in enumerate(["one", "two", "one"]):
        outputs.add(job(name), output(token_id))
    assert not posted
    engine.after_outputs()
    (event,) = posted
    event()
    assert taken == [("one", 0), ("two", 1), ("one", 2)]


def test_tokens_wait_in_the_engine_for_those_of_later_steps(engine: FakeEngine, outputs: StepOutputs) -> None:
    assert engine.output_interval_seconds == COALESCE_SECONDS


def test_a_step_without_outputs_wakes_nobody(engine: FakeEngine, posted: list[Callable[[], None]]) -> None:
    engine.after_outputs()
    assert not posted


def test_what_a_late_event_finds_taken_already_is_not_taken_twice(
    engine: FakeEngine, outputs: StepOutputs, posted: list[Callable[[], None]], taken: list[tuple[Any, Any]]
) -> None:
    for token_id in range(2):
        outputs.add(job("one"), output(token_id))
        engine.after_outputs()
    for event in posted:
        event()
    assert taken == [("one", 0), ("one", 1)]
