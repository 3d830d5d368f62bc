"""What the supervisor tells its child, and when, with a child that is played by hand."""

from collections.abc import Iterator

import pytest

from engine.config import EngineConfig
from engine.messages import AbortSequences, AddSequence, ParentMessage
from engine.supervisor import Supervisor
from tests.fakes.output_recorder import OutputRecorder
from tests.fakes.played_child import INFO, Children
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
