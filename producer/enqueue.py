"""Makes jobs out of what callers ask for, checks them, and puts them on RQ's queues.

Each job is written by one script that does nothing if the job exists already. The id is ours, or follows from its
idempotency key, so whatever is sent twice because a reply was lost is enqueued once.
"""

import json
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import ValidationError

from producer.contract import CONTRACT_VERSION, ErrorCode, JobRequest, keys, summarize
from producer.contract.problems import cut
from producer.durability import check_confirmed, confirm_commands, count_replicas
from producer.enqueue_script import BODY_FIELD, CONFLICT, NEW, NO_DEPENDENCY, SCRIPT, enqueue_call
from producer.errors import InvalidJobError
from producer.idempotency import conflict, fingerprint, id_from_key
from producer.operations import Command, Protocol, send, slices
from producer.rq_names import job_key
from producer.workers import ModelDirectory

PriorityClass = Literal["high", "low"]

MAX_JOBS_A_SEND = 500
MAX_DESCRIPTION_CHARS = 80
JOB_ID_PATTERN = re.compile(r"[A-Za-z0-9_-]{1,128}")


@dataclass(frozen=True, slots=True)
class NewJob:
    """A checked request with its id and its queue."""

    job_id: str
    queue: str
    request: JobRequest
    arguments: str  # RQ's `data`: the label and the keyword arguments as JSON
    body: str | None = None  # the fingerprint that goes with an idempotency key
    depends_on: tuple[str, ...] = ()
    is_new: bool = True


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
        if queue is not None and not re.fullmatch(keys.QUEUE_PATTERN, queue):
            raise InvalidJobError(f"queue: must match {keys.QUEUE_PATTERN}; got {queue!r}", param="queue")
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


_BESIDE_REQUESTS = {
    "queue": "give submit_many queue=, for all of them",
    "priority_class": "give submit_many priority_class=, for all of them",
    "durable": "give submit_many durable=, for all of them",
    "job_id": "give submit_many job_ids=, one for each",
    "depends_on": "submit a job that waits for others by itself, with submit",
}


def build_request(fields: Mapping[str, Any]) -> JobRequest:
    """Raises InvalidJobError naming the field and the remedy."""
    if not isinstance(fields, Mapping):
        raise InvalidJobError(f"a request must be a mapping of fields, such as {{'prompt': …}}; got {fields!r:.60}")
    try:
        return JobRequest.model_validate(dict(fields))
    except ValidationError as error:
        problem = summarize(error)
        raise InvalidJobError(problem.message, param=problem.param) from error


def build_job(request: JobRequest, queue: str, job_id: str | None, depends_on: Sequence[str] = ()) -> NewJob:
    """Raises InvalidJobError for an id that RQ would not take."""
    key = request.idempotency_key
    if key is not None and job_id is not None:
        raise InvalidJobError("idempotency_key: it makes the job's id; leave out job_id", param="idempotency_key")
    for param, given in (("job_id", [job_id] if job_id is not None else []), ("depends_on", depends_on)):
        for name in given:
            if not isinstance(name, str) or not JOB_ID_PATTERN.fullmatch(name):
                raise InvalidJobError(f"{param}: must match {JOB_ID_PATTERN.pattern}; got {name!r}", param=param)
    arguments = encode_call(request)
    if key is None:
        return NewJob(job_id or str(uuid.uuid4()), queue, request, arguments, None, tuple(depends_on))
    keyed_id = id_from_key(keys.split_tenant(queue)[1], key)
    return NewJob(keyed_id, queue, request, arguments, fingerprint(request), tuple(depends_on))


def encode_call(request: JobRequest) -> str:
    """RQ's `data`: what workers take so many bytes of at most (`WorkerInfo.max_request_bytes`)."""
    fields = {"v": CONTRACT_VERSION, **request.model_dump(mode="json", exclude_defaults=True)}
    return json.dumps([keys.JOB_FUNCTION, None, [], fields])


def check_size(request: JobRequest, num_bytes: int, max_bytes: int) -> None:
    """Of a request to generate, which is `num_bytes` long as a job. Raises InvalidJobError where no worker takes it."""
    if num_bytes > max_bytes:
        param = "messages" if request.messages is not None else "prompt"
        rule = f"{param}: the request takes {num_bytes} bytes as a job; workers of {request.model!r} take {max_bytes}"
        message = f"{rule} at most, more than the context could hold: shorten it"
        raise InvalidJobError(message, param=param, code=ErrorCode.CONTEXT_LENGTH_EXCEEDED)


def prepare(
    item: Mapping[str, Any] | JobRequest,
    destination: Destination,
    directory: ModelDirectory,
    job_id: str | None,
    depends_on: Sequence[str] = (),
) -> Protocol[NewJob]:
    """Check one request, and find its queue. Nothing is written. Raises InvalidJobError naming the field."""
    request = item if isinstance(item, JobRequest) else build_request(item)
    try:
        queue = yield from destination.find(directory, request)
    except InvalidJobError as error:
        earlier = (yield from _find_earlier(request, destination, job_id)) if _is_unserved(error) else None
        if earlier is None:
            raise
        queue = earlier  # it has its answer, or waits for a worker that comes back
    return build_job(request, queue, job_id, depends_on)


def _find_earlier(request: JobRequest, destination: Destination, job_id: str | None) -> Protocol[str | None]:
    """The queue of the job that was asked for before under this id, or key."""
    if request.idempotency_key is not None:
        job_id = id_from_key(request.tenant or destination.tenant, request.idempotency_key)
    if job_id is None:
        return None
    [queue] = yield from send(("HGET", job_key(job_id), "origin"))
    return queue.decode() if queue is not None else None


def _is_unserved(error: InvalidJobError) -> bool:
    return error.code is ErrorCode.MODEL_NOT_FOUND


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
            _check_places(item)
            jobs.append((yield from prepare(item, destination, directory, job_ids[at] if job_ids else None)))
        except InvalidJobError as error:
            raise _of_item(error, at) from error
    yield from _check_bodies(jobs)
    return jobs


def _check_places(item: Mapping[str, Any] | JobRequest) -> None:
    """What `submit` takes beside a job's fields is not looked for among those."""
    for name in _BESIDE_REQUESTS if isinstance(item, Mapping) else ():
        if name in item:
            raise InvalidJobError(f"{name}: cannot be part of a request; {_BESIDE_REQUESTS[name]}", param=name)


def _check_bodies(jobs: Sequence[NewJob]) -> Protocol[None]:
    """Keys that were used for something else, before or in this very list, are found before anything is enqueued."""
    keyed = [(at, job) for at, job in enumerate(jobs) if job.body is not None]
    if not keyed:
        return
    stored = yield from send(*(("HGET", job_key(job.job_id), BODY_FIELD) for _, job in keyed))
    bodies = {job.job_id: body.decode() for (_, job), body in zip(keyed, stored, strict=True) if body is not None}
    for at, job in keyed:
        if bodies.setdefault(job.job_id, job.body or "") != job.body:
            raise _of_item(conflict(job.request.idempotency_key, job.job_id), at)


def _of_item(error: InvalidJobError, at: int) -> InvalidJobError:
    where = f"requests[{at}]"
    param = f"{where}.{error.param}" if error.param else where
    return InvalidJobError(f"{where}: {error}", param=param, index=at, code=error.code)


def enqueue(jobs: Sequence[NewJob], *, is_durable: bool = False) -> Protocol[list[NewJob]]:
    """Put the jobs on their queues. One that exists already is left as it is: it comes back with the queue it went to,
    and `is_new` unset.

    Raises InvalidJobError for a key whose body is another, or a dependency that is not known; DurabilityError.
    """
    num_replicas = (yield from count_replicas()) if is_durable else 0
    enqueued: list[NewJob] = []
    for some in slices(jobs, MAX_JOBS_A_SEND):
        confirm = confirm_commands(num_replicas) if is_durable else []
        calls = [_call(job, is_durable) for job in some]
        _, *replies = yield from send(SCRIPT.load, *calls, *confirm)
        enqueued += [_settle(job, reply) for job, reply in zip(some, replies, strict=False)]
        if is_durable:
            check_confirmed(replies[len(some) :])
    return enqueued


def _settle(job: NewJob, reply: Sequence[bytes]) -> NewJob:
    verdict, word = reply
    if verdict == CONFLICT:
        raise conflict(job.request.idempotency_key, job.job_id)
    if verdict == NO_DEPENDENCY:
        message = f"depends_on: job {word.decode()} does not exist, is no longer kept, or was cancelled; leave it out"
        raise InvalidJobError(message, param="depends_on", code=ErrorCode.JOB_NOT_FOUND)
    return replace(job, queue=word.decode() or job.queue, is_new=verdict == NEW)


def _call(job: NewJob, is_durable: bool) -> Command:
    return enqueue_call(
        job.job_id,
        job.queue,
        arguments=job.arguments,
        description=_describe(job.request),
        body=job.body,
        depends_on=job.depends_on,
        is_durable=is_durable,
    )


def _describe(request: JobRequest) -> str:
    """What RQ's tools show of the job."""
    name = "messages" if request.messages else "inputs" if request.inputs else "prompt"
    shown: Any = {
        "messages": request.messages and request.messages[-1].text,
        "inputs": request.inputs and request.inputs[:MAX_DESCRIPTION_CHARS],
    }.get(name, request.prompt)
    return f"{keys.JOB_FUNCTION}({name}={cut(repr(shown), MAX_DESCRIPTION_CHARS)})"
