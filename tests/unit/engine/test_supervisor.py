"""What the supervisor tells its child, and when, with a child that is played by hand."""

import asyncio
import threading
from collections.abc import Iterator

import pytest

from engine.config import EngineConfig
from engine.errors import ModelLoadError
from engine.messages import AbortSequences, AddSequence, FinishCode, ParentMessage, StartProgress, StepOutput
from engine.outputs import RequestOutput
from engine.supervisor import Supervisor
from tests.fakes.output_recorder import OutputRecorder
from tests.fakes.played_child import INFO, Children, PlayedChild
from tests.fakes.request_tables import make_request


@pytest.fixture
def children() -> Children:
    return Children()


@pytest.fixture
def supervisor(children: Children) -> Iterator[Supervisor]:
    supervisor = Supervisor(EngineConfig(model_path=""), children)
    supervisor.launch()
    supervisor.wait_until_ready()
    yield supervisor
    supervisor.stop()


def submit(supervisor: Supervisor, *names: str) -> None:
    for name in names:
        supervisor.submit(make_request(name, on_output=OutputRecorder()))
    supervisor.get_stats()  # answered behind what was posted before


def added(message: ParentMessage) -> int:
    assert isinstance(message, AddSequence)
    return message.sequence_id


def test_a_request_that_comes_while_no_child_is_ready_starts_once_one_is(
    supervisor: Supervisor, children: Children
) -> None:
    first = children.next()
    submit(supervisor, "before")
    assert added(first.is_told()) == 0
    first.die()
    second = children.next()
    submit(supervisor, "meanwhile")
    second.say(INFO)
    assert [added(second.is_told()) for _ in range(2)] == [0, 1]


def test_a_start_may_take_long_while_it_gets_on(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("engine.supervisor.time.monotonic", lambda: clock[0])
    children = Children(is_first_ready=False)
    supervisor = Supervisor(EngineConfig(model_path="", start_timeout_seconds=600.0), children)
    supervisor.launch()
    child = children.next()
    for seconds in range(500, 3000, 500):
        clock[0] = seconds
        child.say(StartProgress("gets on"))
        while supervisor.last_step_at != seconds:
            threading.Event().wait(0.01)
    child.say(INFO)
    assert supervisor.wait_until_ready() == INFO
    supervisor.stop()


def test_a_child_that_had_nothing_to_do_has_the_whole_step_timeout_for_its_next_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = [0.0]
    monkeypatch.setattr("engine.supervisor.time.monotonic", lambda: clock[0])
    children = Children()
    supervisor = Supervisor(EngineConfig(model_path="", step_timeout_seconds=100.0), children)
    supervisor.launch()
    supervisor.wait_until_ready()
    child, output = children.next(), OutputRecorder()
    clock[0] = 1000.0
    supervisor.submit(make_request("late", on_output=output))
    assert added(child.is_told()) == 0
    child.is_silent = True
    monkeypatch.setattr("engine.supervisor._STATS_SECONDS", 0.3)
    supervisor.get_stats()  # a time in which nobody kills it
    child.is_silent = False
    child.say(StepOutput.of_tokens(0, [5], [FinishCode.LENGTH]))
    output.wait_for_tokens(1)
    assert supervisor.get_stats()["num_restarts"] == 0
    supervisor.stop()


def test_a_start_that_gets_on_no_more_is_given_up() -> None:
    children = Children(is_first_ready=False)
    supervisor = Supervisor(EngineConfig(model_path="", start_timeout_seconds=0.3), children)
    supervisor.launch()
    children.next().say(StartProgress("got on"))
    with pytest.raises(ModelLoadError, match=r"start_timeout_seconds \(0.3 s\)"):
        supervisor.wait_until_ready()


def test_a_child_for_which_there_is_no_thread_is_started_again_later(children: Children) -> None:
    has_threads = iter([True, False, True])

    def start_child(config: EngineConfig) -> PlayedChild:
        if not next(has_threads):
            raise RuntimeError("can't start new thread")
        return children(config)

    supervisor = Supervisor(EngineConfig(model_path=""), start_child)
    supervisor.launch()
    supervisor.wait_until_ready()
    submit(supervisor, "one")
    children.next().die()
    child = children.next()
    child.say(INFO)
    assert added(child.is_told()) == 0 and supervisor.is_healthy
    supervisor.stop()


@pytest.mark.parametrize("error", [SystemExit, asyncio.CancelledError])
def test_a_callback_that_raises_whatever_it_likes_ends_its_request_alone(
    supervisor: Supervisor, children: Children, error: type[BaseException]
) -> None:
    def fail(output: RequestOutput) -> None:
        raise error

    other = OutputRecorder()
    supervisor.submit(make_request("one", on_output=fail))
    supervisor.submit(make_request("two", on_output=other))
    child = children.next()
    assert [added(child.is_told()) for _ in range(2)] == [0, 1]
    for sequence_id in (0, 1):
        child.say(StepOutput.of_tokens(sequence_id, [5], [FinishCode.NONE]))
    assert child.is_told() == AbortSequences([0])
    other.wait_for_tokens(1)


def test_a_suspect_that_is_aborted_before_its_first_step_leaves_the_child_to_the_next(
    supervisor: Supervisor, children: Children
) -> None:
    child = children.next()
    submit(supervisor, "one", "two")
    for _ in range(2):
        assert [added(child.is_told()) for _ in range(2)] == [0, 1]
        child.die()
        child = children.next()
        child.say(INFO)
    assert added(child.is_told()) == 0
    supervisor.abort("one")
    assert child.is_told() == AbortSequences([0])
    assert added(child.is_told()) == 1
