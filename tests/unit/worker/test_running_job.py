"""A job between its claim and its commit: its output, its outcome, its times."""

from dataclasses import replace
from typing import Any

import pytest

from engine.outputs import RequestOutput
from engine.sampling_params import SamplingParams
from producer.contract import Choice, ErrorCode, ErrorInfo, JobRequest
from worker.claim import Claim
from worker.outlet.job_stream import JobStream
from worker.running_job import RunningJob, Stage
from worker.translate import TranslatedJob


def make_job(*, n: int = 1, request: JobRequest | None = None, **fields: bytes) -> RunningJob:
    claim = Claim(
        job_id="job",
        queue="q",
        attempt=2,
        execution_id="ex",
        is_resumable=False,
        fields={name.encode(): value for name, value in fields.items()},
        claimed_at=1_000_000_003.0,
    )
    request = request or JobRequest(prompt="x", n=n)
    translated = TranslatedJob(request=request, prompt_token_ids=[1, 2], params=SamplingParams(n=n), seed=0)
    stream = JobStream("job", 2, publish=True, num_prompt_tokens=2, num_choices=n)
    return RunningJob(claim=claim, rq_job=None, stream=stream, model="fake", translated=translated, metadata={"row": 1})


def output(token_ids: list[int], *, offset: int = 0, index: int = 0, **fields: Any) -> RequestOutput:
    text = "".join(f" {token_id}" for token_id in token_ids)
    return RequestOutput(request_id="job:2", index=index, token_offset=offset, token_ids=token_ids, text=text, **fields)


def test_the_last_output_ends_the_job_and_its_result_holds_everything() -> None:
    job = make_job(enqueued_at=b"2001-09-09T01:46:41.500000Z")
    assert not job.take(output([5, 6]))
    assert job.first_token_at is not None and job.stage is Stage.ADMITTED
    assert job.take(output([7], offset=2, finish_reason="length", finished=True))
    job.decide("finished")
    result = job.build_result()
    assert result.choices == [Choice(index=0, text=" 5 6 7", token_ids=[5, 6, 7], finish_reason="length")]
    assert result.usage.total_tokens == 5 and result.attempts == 2 and result.metadata == {"row": 1}
    assert result.timings.queued == 1.5
    assert result.timings.total is not None and result.timings.first_token is not None
    assert job.build_done().usage == result.usage


@pytest.mark.parametrize("enqueued_at", [b"", b"yesterday", b"2001-09-09T01:46:41Z"])
def test_times_that_cannot_be_read_are_left_out(enqueued_at: bytes) -> None:
    job = make_job(enqueued_at=enqueued_at)
    job.end()
    job.decide("cancelled")
    queued = job.build_result().timings.queued
    assert queued == (2.0 if enqueued_at.endswith(b"41Z") else None)


@pytest.mark.parametrize(
    ("status", "reason"), [("cancelled", "cancelled"), ("stopped", "cancelled"), ("failed", "error")]
)
def test_choices_that_were_cut_off_get_the_end_of_the_outcome(status: Any, reason: str) -> None:
    job = make_job(n=2)
    job.take(output([5], index=1, finish_reason="stop"))
    job.end()
    job.decide(status)
    assert [choice.finish_reason for choice in job.build_result().choices] == [reason, "stop"]


def test_the_engines_reason_becomes_the_jobs_error() -> None:
    job = make_job()
    job.take(output([], finish_reason="error", error="too often", error_kind="poison", finished=True))
    assert job.error == ErrorInfo(code=ErrorCode.POISON, message="too often", retryable=True)


def test_a_grammar_that_cannot_be_had_is_the_jobs_own_fault_by_the_field_it_came_in() -> None:
    job = make_job()
    assert job.translated is not None
    request = job.translated.request.model_copy(update={"regex": "(a"})
    job.translated = replace(job.translated, request=request)
    job.take(output([], finish_reason="error", error="unclosed group", error_kind="grammar", finished=True))
    assert job.error == ErrorInfo(code=ErrorCode.INVALID_REQUEST, message="unclosed group", param="regex")


def test_an_abort_for_a_limit_leaves_the_reason_to_the_outcome() -> None:
    job = make_job()
    job.stop_cause = "failed"
    job.take(output([5], finish_reason="cancelled", finished=True))
    job.decide("failed")
    assert job.build_result().choices[0].finish_reason == "error"


def test_a_timeout_counts_the_time_that_the_engine_has_had_the_job() -> None:
    job = make_job()
    assert job.passed_limit(1e9, 0.0) is None
    job.timeout_seconds = 5
    assert job.passed_limit(1e9, 0.0) is None
    job.submitted_at = 100.0
    assert job.passed_limit(104.9, 0.0) is None and job.passed_limit(105.0, 0.0) == "failed"


def test_a_deadline_is_a_moment_whatever_the_engine_has_done() -> None:
    job = make_job(request=JobRequest(prompt="x", deadline=1000.0))
    assert job.passed_limit(0.0, 999.9) is None and job.passed_limit(0.0, 1000.0) == "deadline"
