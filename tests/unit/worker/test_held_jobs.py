"""A worker's claims, and reading what anybody may have written into RQ's records."""

import json
import re
import tracemalloc
import zlib
from typing import Any

import pytest
import redis
from rq.serializers import JSONSerializer
from rq.webhook import Webhook

from producer.contract import keys
from producer.contract.keys import FAILURE_TTL_SECONDS
from worker.claim import Claim
from worker.errors import JobRefusedError
from worker.held_jobs import HeldJobs
from worker.outlet.job_stream import JobStream
from worker.rq_bridge import JobReader
from worker.running_job import RunningJob


def make_claim(job_id: str = "job", attempt: int = 1, **fields: str | bytes) -> Claim:
    raw = {name.encode(): value if isinstance(value, bytes) else value.encode() for name, value in fields.items()}
    return Claim(
        job_id=job_id,
        queue="promptmill",
        attempt=attempt,
        execution_id="ex",
        is_resumable=False,
        fields=raw,
        claimed_at=100.0,
    )


def make_job(claim: Claim) -> RunningJob:
    stream = JobStream(claim.job_id, claim.attempt, publish=True)
    return RunningJob(claim=claim, rq_job=None, stream=stream, model="fake")


def data(function: Any = keys.JOB_FUNCTION, instance: Any = None, args: Any = (), kwargs: Any = None) -> str:
    return json.dumps([function, instance, list(args), {"prompt": "x"} if kwargs is None else kwargs])


@pytest.fixture
def reader() -> JobReader:
    return JobReader(
        redis.Redis(),
        allowed_callbacks=["app.done"],
        allowed_webhooks=["https://hooks.example.com/mill"],
        max_call_bytes=200_000,
    )


@pytest.mark.parametrize("is_nested", [False, True])
def test_a_packed_request_is_unpacked_to_its_limit_and_refused(reader: JobReader, is_nested: bool) -> None:
    """A megabyte of zlib's stands for a gigabyte, and may hold another one."""
    packed = zlib.compress(b"[" * (64 << 20), 9)
    if is_nested:
        packed = zlib.compress(packed + b" " * 300_000)
    tracemalloc.start()
    try:
        job, problem = reader.restore(make_claim(data=packed, exc_info=packed, status="queued", retries_left="2"))
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert problem is not None and problem.info.code == "context_length_exceeded"
    assert "the request has more than 200000 bytes" in problem.info.message
    assert peak_bytes < 4 << 20 and job.retries_left == 2 and job.data == b""


@pytest.mark.parametrize("is_packed", [False, True])
def test_a_list_of_inputs_may_be_longer_than_a_prompt(reader: JobReader, is_packed: bool) -> None:
    """Each of them may fill the context."""

    def problem_of(num_bytes: int) -> str | None:
        call = data(kwargs={"v": 1, "task": "embed", "inputs": ["x" * 50_000] * (num_bytes // 50_000)})
        job, problem = reader.restore(make_claim(data=zlib.compress(call.encode()) if is_packed else call.encode()))
        assert problem is not None or len(reader.read_kwargs(job)["inputs"]) == num_bytes // 50_000
        return str(problem.info.code) if problem is not None else None

    assert problem_of(6_000_000) is None
    assert problem_of(9_000_000) == "context_length_exceeded"


def test_a_request_beyond_its_limit_that_is_not_packed_is_refused(reader: JobReader) -> None:
    job, problem = reader.restore(make_claim(data=data(kwargs={"prompt": "x" * 200_000}), status="queued"))
    assert problem is not None and "the request has more than 200000 bytes" in problem.info.message
    assert job.data == b""


def test_a_packed_request_within_its_limit_is_read(reader: JobReader) -> None:
    job, problem = reader.restore(make_claim(data=zlib.compress(data().encode()), status="queued"))
    assert problem is None and reader.read_kwargs(job) == {"prompt": "x"}


def test_a_claim_reads_the_scripts_reply() -> None:
    claim = Claim.parse([b"j", b"q", 3, b"ex", 1, [b"status", b"started", b"data", b"x"]], 7.0)
    assert claim.fence == "3:ex" and claim.is_resumable and not claim.is_orphan
    assert claim.fields == {b"status": b"started", b"data": b"x"}


@pytest.mark.parametrize("status", [None, "canceled"])
def test_a_cancelled_or_deleted_job_is_an_orphan(status: str | None) -> None:
    claim = make_claim() if status is None else make_claim(status=status)
    assert claim.is_orphan


def test_jobs_are_admitted_in_the_order_of_their_claims() -> None:
    held = HeldJobs()
    claims = [make_claim(str(number)) for number in range(3)]
    for claim in claims:
        held.take(claim)
    held.release(claims[1])
    admitted = []
    while waiting := held.next_waiting():
        held.admit(make_job(waiting))
        admitted.append(waiting.job_id)
    assert admitted == ["0", "2"] and held.num_sequences == 2


def test_a_stop_that_comes_before_the_admission_is_kept() -> None:
    held = HeldJobs()
    held.take(make_claim())
    held.stop_early("job", "cancelled")
    job = make_job(make_claim())
    held.next_waiting()
    job.claim = held.claims()[0]
    held.admit(job)
    assert job.stop_cause == "cancelled"


def test_a_job_that_comes_back_replaces_its_older_claim() -> None:
    held = HeldJobs()
    old, new = make_claim(attempt=1), make_claim(attempt=2)
    held.take(old)
    held.take(new)
    assert held.next_waiting() is new and len(held) == 1
    held.release(old)
    assert held.is_current(new)


def test_a_stop_of_an_older_claim_is_none_of_the_job_in_its_place() -> None:
    """Deleted while it waited, and another submitted under its id."""
    held = HeldJobs()
    held.take(make_claim(attempt=1))
    held.stop_early("job", "cancelled")
    held.take(make_claim(attempt=2))
    new = held.next_waiting()
    assert new is not None
    job = make_job(new)
    held.admit(job)
    assert job.stop_cause is None


def test_a_good_call_gives_its_fields(reader: JobReader) -> None:
    enqueued_at = "2026-11-27T10:00:00.123456Z"
    job, problem = reader.restore(make_claim(data=data(), status="started", enqueued_at=enqueued_at))
    assert problem is None and reader.read_kwargs(job) == {"prompt": "x"}
    assert job.enqueued_at.isoformat() == enqueued_at.replace("Z", "+00:00")
    assert job.serializer is JSONSerializer  # for what RQ's handlers write of it


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        ("\x80\x04pickle", "JSON"),
        ("[" * 100_000, "JSON"),
        ("{}", "JSON list"),
        ("5", "JSON list"),
        ('{"a": 0, "b": 1, "c": 2, "d": 3}', "JSON list"),
        (data(function="os.system"), "os.system"),
        (data(function=["x"]), "promptmill.generate"),
        (data(instance={"a": 1}), "must be the JSON list"),
        (data(args=["x"]), "positional"),
        (data(kwargs=["x"]), "JSON object"),
    ],
)
def test_a_bad_call_is_refused_with_the_reason(reader: JobReader, call: str, reason: str) -> None:
    job, _ = reader.restore(make_claim(data=call.encode("latin-1"), status="started"))
    with pytest.raises(JobRefusedError, match=reason):
        reader.read_kwargs(job)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"data": "x", "timeout": "soon"},
        {"data": "x", "created_at": "yesterday"},
        {"data": "x", "status": "unheard of"},
        {"data": "x", "result_ttl": "long"},
        {"data": "x", "origin": b"\xff"},
        {"data": "x", "dependency_ids": "{"},
        {"data": "x", "timeout": "9" * 400},
        {"data": "x", "ttl": "-" + "9" * 30},
        {"data": "x", "failure_callback_timeout": "9" * 20},
        {"data": "x", "retry_intervals": "[1e400]"},
        {"data": "x", "retry_intervals": "{}"},
        {"data": "x", "repeat_intervals": "[-5]"},
    ],
)
def test_a_malformed_record_is_a_problem_and_no_exception(reader: JobReader, fields: dict[str, Any]) -> None:
    job, problem = reader.restore(make_claim(**fields))
    assert problem is not None and re.search(r"malformed \(.+\)", str(problem))
    assert job.origin == "promptmill" and job.failure_ttl == FAILURE_TTL_SECONDS


def test_only_allowed_callbacks_and_webhooks_stay_on_the_job(reader: JobReader) -> None:
    hooks = [
        Webhook("https://hooks.example.com/mill/a", "finished"),
        Webhook("https://hooks.example.com.evil.org/mill/", "failed"),
        Webhook("http://hooks.example.com/mill/", "failed"),
        Webhook("https://hooks.example.com/other", "failed"),
        Webhook("https://hooks.example.com/mill-of-others", "failed"),
        Webhook("https://hooks.example.com/mill/../other", "failed"),
        Webhook("https://hooks.example.com/mill/%2e%2e/other", "failed"),
    ]
    claim = make_claim(
        data=data(),
        success_callback_name="app.done",
        failure_callback_name="os.abort",
        webhooks=json.dumps([hook.to_dict() for hook in hooks]),
    )
    job, problem = reader.restore(claim)
    assert problem is not None and "os.abort" in str(problem) and "evil.org" in str(problem)
    assert job._success_callback_name == "app.done" and job._failure_callback_name is None
    assert [hook.url for hook in job.webhooks] == ["https://hooks.example.com/mill/a"]
