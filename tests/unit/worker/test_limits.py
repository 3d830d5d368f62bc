"""Deadlines and timeouts of running jobs: each is told of in time, and none of a job that has ended."""

from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.unit.worker.test_held_jobs import make_claim, make_job
from worker.held_jobs import HeldJobs
from worker.limits import Limits
from worker.running_job import RunningJob

EPOCH = 1_000_000.0  # the two clocks differ


@pytest.fixture
def held() -> HeldJobs:
    return HeldJobs()


@pytest.fixture
def limits(held: HeldJobs) -> Limits:
    return Limits(held)


def run(
    held: HeldJobs, limits: Limits, job_id: str, *, deadline: float | None = None, timeout: float | None = None
) -> RunningJob:
    """A job that the engine was given at 0."""
    held.take(make_claim(job_id))
    claim = held.next_waiting()
    assert claim is not None
    job = make_job(claim)
    job.timeout_seconds, job.submitted_at = timeout, 0.0
    request = SimpleNamespace(deadline=deadline if deadline is None else EPOCH + deadline)
    job.translated = cast(Any, SimpleNamespace(request=request, params=SimpleNamespace(n=1)))
    held.admit(job)
    limits.add(job)
    return job


def passed(limits: Limits, now: float) -> list[str]:
    return [job.job_id for job in limits.take_passed(now, EPOCH + now)]


def test_without_limits_nothing_is_due(held: HeldJobs, limits: Limits) -> None:
    run(held, limits, "a")
    assert limits.seconds_until_due(0.0, EPOCH) is None and passed(limits, 1e6) == []


def test_the_soonest_limit_is_due_first_whatever_its_clock(held: HeldJobs, limits: Limits) -> None:
    run(held, limits, "late", deadline=50.0)
    run(held, limits, "timeout", timeout=5.0)
    run(held, limits, "deadline", deadline=3.0)
    assert limits.seconds_until_due(1.0, EPOCH + 1.0) == pytest.approx(2.0)
    assert passed(limits, 2.9) == []
    assert passed(limits, 3.0) == ["deadline"]
    assert limits.seconds_until_due(3.0, EPOCH + 3.0) == pytest.approx(2.0)
    assert passed(limits, 100.0) == ["late", "timeout"]
    assert limits.seconds_until_due(100.0, EPOCH + 100.0) is None


def test_a_clock_that_is_set_forward_is_believed(held: HeldJobs, limits: Limits) -> None:
    run(held, limits, "a", deadline=3600.0)
    assert [job.job_id for job in limits.take_passed(1.0, EPOCH + 4000.0)] == ["a"]


def test_a_job_that_has_ended_passes_no_limit(held: HeldJobs, limits: Limits) -> None:
    run(held, limits, "ended", timeout=1.0).end()
    held.release(run(held, limits, "released", timeout=1.0).claim)
    assert passed(limits, 2.0) == []


def test_a_later_attempt_is_held_to_its_own_time(held: HeldJobs, limits: Limits) -> None:
    held.release(run(held, limits, "a", timeout=1.0).claim)
    job = run(held, limits, "a", timeout=1.0)
    job.submitted_at = 10.0
    limits.add(job)
    assert passed(limits, 2.0) == []
    assert passed(limits, 11.0) == ["a"]


def test_limits_of_jobs_that_have_ended_do_not_pile_up(held: HeldJobs, limits: Limits) -> None:
    running = run(held, limits, "running", deadline=1000.0, timeout=2000.0)
    for number in range(1000):
        held.release(run(held, limits, str(number), deadline=500.0, timeout=500.0).claim)
    assert len(limits._deadlines) + len(limits._timeouts) < 100
    assert passed(limits, 1000.0) == [running.job_id]
