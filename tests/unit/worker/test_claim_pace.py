"""A worker looks for jobs when it hears of one, and often only where nobody tells it."""

from collections.abc import Callable

import pytest

from worker.claim_pace import BUSY_SECONDS, IDLE_SECONDS, MIN_SECONDS, WATCHED_SECONDS, ClaimPace

Look = Callable[..., None]


class Wakes:
    def __init__(self) -> None:
        self.num_wakes = 0

    def __call__(self) -> None:
        self.num_wakes += 1


@pytest.fixture
def wakes() -> Wakes:
    return Wakes()


@pytest.fixture
def pace(wakes: Wakes) -> ClaimPace:
    """It is watched, and its queues were empty at 100."""
    pace = ClaimPace(wakes)
    pace.set_watched(True)
    look(pace, 100.0)
    wakes.num_wakes = 0
    return pace


def look(pace: ClaimPace, now: float, *, may_have_more: bool = False, is_busy: bool = False) -> None:
    pace.begin()
    pace.end(now, may_have_more=may_have_more, is_busy=is_busy)


def test_the_first_look_is_due_at_once(wakes: Wakes) -> None:
    assert ClaimPace(wakes).seconds_until_due(100.0) == 0.0


@pytest.mark.parametrize(("is_busy", "seconds"), [(False, IDLE_SECONDS), (True, BUSY_SECONDS)])
def test_queues_that_nobody_watches_are_looked_at_often(wakes: Wakes, is_busy: bool, seconds: float) -> None:
    pace = ClaimPace(wakes)
    look(pace, 100.0, is_busy=is_busy)
    assert pace.seconds_until_due(100.0) == pytest.approx(seconds)


def test_watched_queues_are_left_alone_until_something_arrives(pace: ClaimPace, wakes: Wakes) -> None:
    assert pace.seconds_until_due(100.5) == pytest.approx(WATCHED_SECONDS - 0.5)
    pace.note_arrival()
    assert pace.seconds_until_due(100.5) == 0.0 and wakes.num_wakes == 1


def test_many_arrivals_wake_once_and_are_looked_at_together(pace: ClaimPace, wakes: Wakes) -> None:
    for _ in range(10):
        pace.note_arrival()
    assert wakes.num_wakes == 1
    assert pace.seconds_until_due(100.0) == pytest.approx(MIN_SECONDS)
    look(pace, 100.0 + MIN_SECONDS)
    assert pace.seconds_until_due(100.0 + MIN_SECONDS) == pytest.approx(WATCHED_SECONDS)


def test_what_arrives_during_a_look_is_looked_at_after_it(pace: ClaimPace) -> None:
    pace.begin()
    pace.note_arrival()
    pace.end(200.0, may_have_more=False, is_busy=True)
    assert pace.seconds_until_due(200.0) == pytest.approx(MIN_SECONDS)


def test_a_full_look_is_followed_by_another_at_once(pace: ClaimPace) -> None:
    look(pace, 200.0, may_have_more=True)
    assert pace.seconds_until_due(200.0) == 0.0


def test_a_look_that_does_not_come_to_its_end_is_due_again(pace: ClaimPace) -> None:
    pace.begin()
    assert pace.seconds_until_due(100.0) == 0.0


def test_a_watch_that_is_lost_makes_the_looks_frequent_again(pace: ClaimPace, wakes: Wakes) -> None:
    pace.set_watched(False)
    assert wakes.num_wakes == 1
    look(pace, 200.0)
    assert pace.seconds_until_due(200.0) == pytest.approx(IDLE_SECONDS)


def test_the_queues_of_arrivals_are_told_once_to_the_next_look(pace: ClaimPace) -> None:
    pace.note_arrival(["a@x", "a@y"])
    pace.note_arrival(["a@x"])
    assert pace.begin() == ["a@x", "a@y"]
    pace.note_arrival(["a@z"])
    assert pace.begin() == ["a@z"]
    assert pace.begin() == []
