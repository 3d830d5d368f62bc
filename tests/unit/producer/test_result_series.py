"""Buckets of throughput and latency: what counts where, and how exact a percentile is."""

import random
from collections import Counter

import pytest

from producer.contract import JobOutcome, Timings, Usage
from producer.gateway.console.ended_jobs import EndedJob, EndedJobs
from producer.gateway.console.result_series import Bucket, ResultSeries, merged, percentile

NOW = 1_800_000_000.0


def ended(
    at: float, *, job_id: str = "a", queue: str = "q", status: JobOutcome = "finished", total: float | None = 1.0
) -> EndedJob:
    return EndedJob(
        job_id=job_id,
        queue=queue,
        ended_at=at,
        status=status,
        model="m",
        usage=Usage(prompt_tokens=3, completion_tokens=5, total_tokens=8),
        timings=Timings(first_token=total and total / 2, total=total),
        attempts=1,
        error=None,
    )


def test_jobs_and_tokens_count_in_the_step_in_which_the_job_ended() -> None:
    series = ResultSeries()
    for at in (NOW - 95, NOW - 35, NOW - 34):
        series.add(ended(at))
    begin, steps = series.read(NOW, 30)
    assert len(steps) == 120 and begin == NOW - 3600
    counted = {begin + 30 * at: step.num_finished for at, step in enumerate(steps) if step.num_finished}
    assert counted == {NOW - 120: 1, NOW - 60: 2}
    assert merged(steps).num_output_tokens == 15 and merged(steps).num_prompt_tokens == 9


def test_a_step_that_is_not_over_is_not_shown() -> None:
    series = ResultSeries()
    series.add(ended(NOW + 3))
    assert merged(series.read(NOW + 5, 10)[1]).num_finished == 0
    assert merged(series.read(NOW + 10, 10)[1]).num_finished == 1


def test_outcomes_are_told_apart_and_what_was_cut_short_has_no_latency() -> None:
    series = ResultSeries()
    for status in ("finished", "failed", "cancelled", "stopped"):
        series.add(ended(NOW - 60, status=status))
    whole = merged(series.read(NOW, 10)[1])
    assert (whole.num_finished, whole.num_failed, whole.num_cancelled) == (1, 1, 2)
    assert whole.total.total() == 1 and whole.first_token.total() == 4


def test_queues_are_read_one_by_one_or_together() -> None:
    series = ResultSeries()
    for queue in ("a", "a", "b"):
        series.add(ended(NOW - 60, queue=queue))
    counts = [merged(series.read(NOW, 60, queue)[1]).num_finished for queue in ("a", "b", "c", None)]
    assert counts == [2, 1, 0, 3] and series.queues == ["a", "b"]


def test_what_is_older_than_the_hour_is_forgotten() -> None:
    series = ResultSeries()
    series.add(ended(NOW - 3700, queue="old"))
    series.add(ended(NOW - 60, queue="new"))
    series.forget(NOW)
    assert series.queues == ["new"]


@pytest.mark.parametrize("share", [0.5, 0.95])
def test_a_percentile_is_exact_to_half_a_bin(share: float) -> None:
    values = sorted(random.Random(7).lognormvariate(0, 1.5) for _ in range(5_000))
    series = ResultSeries()
    for at, value in enumerate(values):
        series.add(ended(NOW - 60 - at % 600, total=value))
    exact = values[int(share * len(values)) - 1]
    assert percentile(merged(series.read(NOW, 30)[1]).total, share) == pytest.approx(exact, rel=0.026)


def test_no_job_has_no_percentile_and_no_time_is_no_error() -> None:
    assert percentile(Counter(), 0.5) is None
    bucket = Bucket()
    bucket.add(ended(NOW, total=0.0))
    assert percentile(bucket.total, 0.95) == pytest.approx(0.001, rel=0.05)


def test_the_last_end_of_a_job_counts_and_the_oldest_jobs_are_forgotten() -> None:
    jobs = EndedJobs(max_jobs=2)
    for job_id, status in (("a", "failed"), ("b", "finished"), ("a", "finished"), ("c", "finished")):
        jobs.add(ended(NOW, job_id=job_id, status=status))  # type: ignore[arg-type]
    assert [job.job_id for job in jobs.newest(5)] == ["c", "a"]
    assert jobs.find("b") is None and (found := jobs.find("a")) is not None and found.status == "finished"
