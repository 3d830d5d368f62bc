"""Makes jobs out of what callers ask for, checks them, and puts them on RQ's queues.

Each job is written by one script that does nothing if the job exists already. The id is ours, so whatever is sent twice
because a reply was lost is enqueued once.
"""

import json
import re
import uuid
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import ValidationError
from pydantic_core import PydanticSerializationError

from producer.contract import CONTRACT_VERSION, JobRequest, keys, summarize
from producer.errors import InvalidJobError
from producer.operations import Command, Protocol, Script, send
from producer.rq_names import QUEUES_KEY, job_key, queue_key
from producer.workers import ModelDirectory

PriorityClass = Literal["high", "low"]

MAX_JOBS_A_SEND = 500
MAX_DESCRIPTION_CHARS = 80
NO_TIMEOUT = -1  # RQ's: how long a job may run is up to its max_tokens and to the worker
JOB_ID_PATTERN = re.compile(r"[A-Za-z0-9_-]{1,128}")
QUEUE_PATTERN = re.compile(r"[A-Za-z0-9_.:@-]{1,128}")


@dataclass(frozen=True, slots=True)
class NewJob:
    """A checked request with its id and its queue."""

    job_id: str
    queue: str
    request: JobRequest
    arguments: str  # RQ's `data`: the label and the keyword arguments as JSON


@dataclass(frozen=True, slots=True)
class Destination:
    """Where jobs go: a queue (perhaps a tenant's) named by the caller, else the client's; and its priority class."""

    queue: str
    tenant: str | None
    is_given: bool
    priority_class: str

    @classmethod
    def choose(cls, default_queue: str, queue: str | None, priority_class: str | None) -> "Destination":
        """Raises InvalidJobError."""
        if queue is not None and not QUEUE_PATTERN.fullmatch(queue):
            raise InvalidJobError(f"queue: must match {QUEUE_PATTERN.pattern}; got {queue!r}", param="queue")
        if priority_class is not None and priority_class not in keys.PRIORITY_CLASSES:
            raise InvalidJobError(
                f"priority_class: must be 'high' or 'low', or left out; got {priority_class!r}", param="priority_class"
            )
        base, tenant = keys.split_tenant(queue or default_queue)
        return cls(base, tenant, queue is not None, priority_class or "")

    def find(self, directory: ModelDirectory, request: JobRequest) -> Protocol[str]:
        """The queue for a job. Raises InvalidJobError if no live worker serves its model."""
        queue = self.queue
        if self.tenant is not None and request.tenant not in (None, self.tenant):
            named = keys.tenant_queue(queue, self.tenant)
            raise InvalidJobError(f"tenant: the queue {named!r} is another tenant's; leave out one", param="tenant")
        if request.model is not None:
            found = yield from directory.find_queue(request.model, queue)
            queue = queue if self.is_given else found
        return keys.tenant_queue(keys.class_queue(queue, self.priority_class), request.tenant or self.tenant)


def build_request(fields: Mapping[str, Any]) -> JobRequest:
    """Raises InvalidJobError naming the field and the remedy."""
    if not isinstance(fields, Mapping):
        raise InvalidJobError(f"a request must be a mapping of fields, such as {{'prompt': …}}; got {fields!r:.60}")
    try:
        return JobRequest.model_validate(dict(fields))
    except ValidationError as error:
        problem = summarize(error)
        raise InvalidJobError(problem.message, param=problem.param) from error


def build_job(request: JobRequest, queue: str, job_id: str | None) -> NewJob:
    """Raises InvalidJobError for an id that RQ would not take, or metadata that is no JSON."""
    if job_id is not None and not JOB_ID_PATTERN.fullmatch(job_id):
        raise InvalidJobError(f"job_id: must match {JOB_ID_PATTERN.pattern}; got {job_id!r}", param="job_id")
    try:
        given = {"v": CONTRACT_VERSION, **request.model_dump(mode="json", exclude_defaults=True)}
        arguments = json.dumps([keys.JOB_FUNCTION, None, [], given])
    except PydanticSerializationError as error:
        raise InvalidJobError(f"metadata: must be JSON: {error}", param="metadata") from error
    return NewJob(job_id or str(uuid.uuid4()), queue, request, arguments)


def prepare(
    item: Mapping[str, Any] | JobRequest, destination: Destination, directory: ModelDirectory, job_id: str | None
) -> Protocol[NewJob]:
    """Check one request, and find its queue. Nothing is written. Raises InvalidJobError naming the field."""
    request = item if isinstance(item, JobRequest) else build_request(item)
    queue = yield from destination.find(directory, request)
    return build_job(request, queue, job_id)


def prepare_many(
    items: Sequence[Mapping[str, Any] | JobRequest],
    destination: Destination,
    directory: ModelDirectory,
    job_ids: Sequence[str] | None,
) -> Protocol[list[NewJob]]:
    """Check every request. Nothing is written. Raises InvalidJobError naming the item, by its index, and the field."""
    if job_ids is not None and (len(job_ids) != len(items) or len(set(job_ids)) != len(job_ids)):
        raise InvalidJobError(f"job_ids: must be {len(items)} different ids, one for each request", param="job_ids")
    jobs: list[NewJob] = []
    for at, item in enumerate(items):
        try:
            jobs.append((yield from prepare(item, destination, directory, job_ids[at] if job_ids else None)))
        except InvalidJobError as error:
            where = f"requests[{at}]"
            param = f"{where}.{error.param}" if error.param else where
            raise InvalidJobError(f"{where}: {error}", param=param, index=at, code=error.code) from error
    return jobs


def enqueue(jobs: Sequence[NewJob]) -> Protocol[list[bool]]:
    """Put the jobs on their queues. Returns for each whether it is new; one that exists already is left as it is."""
    are_new: list[bool] = []
    for start in range(0, len(jobs), MAX_JOBS_A_SEND):
        some = jobs[start : start + MAX_JOBS_A_SEND]
        _, *replies = yield from send(_SCRIPT.load, *(_call(job) for job in some))
        are_new += [bool(reply) for reply in replies]
    return are_new


def _call(job: NewJob) -> Command:
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    fields: dict[str, Any] = {
        "status": "queued",
        "origin": job.queue,
        "created_at": now,
        "enqueued_at": now,
        "description": _describe(job.request),
        "timeout": NO_TIMEOUT,
        "result_ttl": keys.RESULT_TTL_SECONDS,
        "failure_ttl": keys.FAILURE_TTL_SECONDS,
        "data": zlib.compress(job.arguments.encode()),
    }
    return _SCRIPT.call(
        keys=[job_key(job.job_id), queue_key(job.queue), QUEUES_KEY, keys.turns_key(keys.split_tenant(job.queue)[0])],
        arguments=[job.job_id, job.queue, *(part for field in fields.items() for part in field)],
    )


def _describe(request: JobRequest) -> str:
    """What RQ's tools show of the job."""
    shown: Any = request.messages[-1].text if request.messages else request.prompt
    text = repr(shown)
    text = text if len(text) <= MAX_DESCRIPTION_CHARS else text[: MAX_DESCRIPTION_CHARS - 1] + "…"
    return f"{keys.JOB_FUNCTION}({'messages' if request.messages else 'prompt'}={text})"


_SCRIPT = Script("""
if redis.call('EXISTS', KEYS[1]) == 1 then return 0 end
redis.call('HSET', KEYS[1], unpack(ARGV, 3))
redis.call('SADD', KEYS[3], KEYS[2])
redis.call('RPUSH', KEYS[2], ARGV[1])
local last = redis.call('ZREVRANGE', KEYS[4], 0, 0, 'WITHSCORES')
redis.call('ZADD', KEYS[4], 'NX', (tonumber(last[2]) or 0) + 1, ARGV[2])
return 1
""")
