"""What must hold of a mixture of jobs once all is healed: one outcome each, everywhere the same, and nothing left."""

import itertools
import json
from collections import defaultdict

import redis
from botocore.exceptions import ClientError
from pydantic import ValidationError

from producer.contract import ErrorCode, Result, keys
from tests.acceptance.chaos.mixture import Mixture
from tests.acceptance.chaos.verdict import LEFTOVERS
from tests.acceptance.chaos.watchers import Watched
from tests.fakes.fake_tokenizer import VOCAB_SIZE, text_of
from tests.fakes.flaky_s3 import BUCKET, FlakyS3
from tests.fakes.redis_reads import set_names, stream_rows
from tests.fakes.worker_runs import rq_queue

WAITING = ("rq:ready:*", "rq:deferred:*", "rq:scheduled:*", "rq:rl:*:allowed", "rq:rl:*:rate_limited")
FOR_EVER = (
    *(b"rq:queues", b"rq:finished:", b"rq:canceled:", b"rq:failed:", b"rq:worker", b"rq:rl"),
    *(b"promptmill:worker", b"promptmill:leased:"),
)
STEP = 7  # between two tokens of the fake engine
RQ_STATUS = {"finished": b"finished", "failed": b"failed", "cancelled": b"canceled"}


def left_behind(connection: redis.Redis) -> list[str]:
    return [key.decode() for pattern in (*LEFTOVERS, *WAITING) for key in connection.scan_iter(pattern)]


def find_problems(
    connection: redis.Redis,
    mixture: Mixture,
    seen: dict[str, Watched],
    store: FlakyS3 | None,
    *,
    keeps_outcomes: bool,
) -> list[str]:
    """Without `keeps_outcomes` a job may end as it may, be seen to, and then, its outcome lost, end once more."""
    found = [f"left behind: {key}" for key in left_behind(connection)]
    found += [
        f"kept for ever: {key!r}"
        for key in connection.scan_iter()
        if connection.ttl(key) == -1 and not key.startswith(FOR_EVER)
    ]
    ends = end_times(connection)
    registries = _registries(connection)
    for job_id, expected in mixture.expected.items():
        wire = connection.get(keys.result_key(job_id))
        if wire is None:
            found.append(f"{job_id}: no result; RQ says {connection.hget(f'rq:job:{job_id}', 'status')!r}")
            continue
        result = Result.model_validate_json(wire)
        problems = _store_problems(result, store)
        if store is not None and result.stored is not None and not problems:
            result = whole(result, store)
        problems += [
            *_output_problems(result),
            *_watch_problems(result, seen.get(job_id), expected, keeps_outcomes),
        ]
        if result.status not in expected:
            problems.append(f"ended as {result.status}: {result.error}")
        if len(ends[job_id]) != mixture.num_runs.get(job_id, 1):
            problems.append(f"results lines at {ends[job_id]}")
        is_kept = job_id not in mixture.forgotten
        if registries.get(job_id, []) != [result.status] * is_kept:
            problems.append(f"{result.status}, in the registries {registries.get(job_id)}")
        if is_kept and connection.hget(f"rq:job:{job_id}", "status") != RQ_STATUS[result.status]:
            problems.append(f"{result.status}, and RQ does not say so")
        found += [f"{job_id}: {problem}" for problem in problems]
    return found


def end_times(connection: redis.Redis) -> dict[str, list[float]]:
    """When each job ended, by the results lines: epoch seconds, once for each time."""
    found: dict[str, list[float]] = defaultdict(list)
    for key in connection.scan_iter("promptmill:results:*"):
        for entry_id, fields in stream_rows(connection, key.decode()):
            found[json.loads(fields[keys.DATA_FIELD.encode()])["job_id"]].append(int(entry_id.split(b"-")[0]) / 1000)
    return found


def _registries(connection: redis.Redis) -> dict[str, list[str]]:
    """By job id, those it is in, by the outcome that each stands for."""
    found: dict[str, list[str]] = {}
    for key in set_names(connection, "rq:queues"):
        queue = rq_queue(connection, key.split(":", 2)[2])
        for status, registry in (
            ("finished", queue.finished_job_registry),
            ("failed", queue.failed_job_registry),
            ("cancelled", queue.canceled_job_registry),
        ):
            for job_id in registry.get_job_ids(cleanup=False):
                found.setdefault(job_id, []).append(status)
    return found


def whole(result: Result, store: FlakyS3) -> Result:
    """A result with what the bucket has of it."""
    key = str(result.stored).removeprefix(f"s3://{BUCKET}/")
    return Result.model_validate_json(store.objects.Object(key).get()["Body"].read())


def _store_problems(result: Result, store: FlakyS3 | None) -> list[str]:
    """Outcomes lie in the bucket, all else in Redis alone; what lies there is what Redis says of it."""
    is_given_up = result.error is not None and result.error.code is ErrorCode.RESULT_STORE_ERROR
    if result.stored is None:
        is_right = store is None or is_given_up or result.status in ("failed", "cancelled")
        return [] if is_right else ["its result should lie in the bucket"]
    if store is None or result.choices:
        return [f"{len(result.choices)} choices beside {result.stored}"]
    try:
        stored = whole(result, store)
    except (ClientError, ValidationError) as error:
        return [f"{result.stored}: {error}"]
    return [] if stored.model_copy(update={"choices": [], "stored": result.stored}) == result else [f"{stored} in S3"]


def _output_problems(result: Result) -> list[str]:
    """The fake's tokens tell where one is missing or there twice."""
    found = []
    for choice in result.choices:
        tokens = choice.token_ids
        if any((after - before) % VOCAB_SIZE != STEP for before, after in itertools.pairwise(tokens)):
            found.append(f"tokens {tokens}")
        if choice.text != text_of(tokens):
            found.append(f"text {choice.text!r} of {tokens}")
    return found


def _watch_problems(result: Result, watched: Watched | None, expected: set[str], keeps_outcomes: bool) -> list[str]:
    """An outcome that was lost, and may have been another, was whole when it was seen, and of the same tokens."""
    if watched is None:
        return []
    may_have_failed = result.status == "failed" or (not keeps_outcomes and "failed" in expected)
    if may_have_failed and "JobFailedError" in (watched.problem or ""):
        return []
    if watched.problem is not None or not watched.has_ended or watched.end is None:
        return [f"its subscriber: {watched.problem or 'saw no end'}"]
    texts = ["".join(chunk.text for chunk in watched.chunks if chunk.index == c.index) for c in result.choices]
    right = [choice.text for choice in result.choices]
    if watched.num_tokens.total() != watched.end.usage.completion_tokens:
        return [f"its subscriber saw {texts}, and at the end {watched.end}"]
    if texts == right or (not keeps_outcomes and all(map(_is_beginning, texts, right))):
        return []
    return [f"its subscriber saw {texts}"]


def _is_beginning(some: str, other: str) -> bool:
    """One of the two is as the other begins."""
    return some.startswith(other) or other.startswith(some)
