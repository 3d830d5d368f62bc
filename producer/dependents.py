"""Jobs that wait for others (RQ's `depends_on`): for which, and how they end with these.

RQ lets a job wait for as long as one of those has failed, was cancelled or is forgotten (unless it was enqueued with
`allow_failure`): until that one is retried and finishes, or somebody cancels the one that waits.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from producer.cancel import cancel
from producer.operations import Protocol, send, slices
from producer.outcome import JobStatus, parse_status
from producer.queues import MAX_JOBS_A_READ, read_queues
from producer.rq_names import dependencies_key, dependents_key, job_key, registry_key


@dataclass(frozen=True, slots=True)
class DeferredJob:
    """`waits_for`: by id, those that have not finished, and where they stand; None: not known (any more)."""

    job_id: str
    queue: str
    waits_for: dict[str, JobStatus | None]


def read_deferred(default_queue: str, limit: int | None = None) -> Protocol[list[DeferredJob]]:
    """The jobs that wait for others on the queues that `read_queues` lists, the oldest first, as far as
    seconds tell; `limit` at most."""
    queues = yield from read_queues(default_queue)
    found: list[tuple[str, str]] = []  # id, queue
    for queue in queues:
        if queue.registries["deferred"]:
            [members] = yield from send(("ZRANGE", registry_key("deferred", queue.name), 0, -1))
            found += [(member.decode(), queue.name) for member in members]
    deferred: list[DeferredJob] = []
    for some in slices(found[:limit], MAX_JOBS_A_READ):
        waits = yield from send(*(("SMEMBERS", dependencies_key(job_id)) for job_id, _ in some))
        names = sorted({name.decode() for dependencies in waits for name in dependencies})
        statuses = yield from _read_statuses(names)
        for (job_id, queue_name), dependencies in zip(some, waits, strict=True):
            waits_for: dict[str, JobStatus | None] = {}
            for name in sorted(name.decode() for name in dependencies):
                if statuses[name] is not JobStatus.FINISHED:
                    waits_for[name] = statuses[name]
            deferred.append(DeferredJob(job_id, queue_name, waits_for))
    return deferred


def cancel_dependents(job_id: str) -> Protocol[list[str]]:
    """Cancel the jobs that wait for this one, and those that wait for them; also for those that are cancelled already,
    perhaps by a call that broke off. Their ids, in this order."""
    cancelled: list[str] = []
    left, seen = [job_id], {job_id}
    while left:
        [names] = yield from send(("SMEMBERS", dependents_key(left.pop(0))))
        dependents = sorted(name for name in map(bytes.decode, names) if name not in seen)
        seen.update(dependents)
        statuses = yield from _read_statuses(dependents)
        for name in dependents:
            if statuses[name] is JobStatus.WAITING and (yield from cancel(name)):
                cancelled.append(name)
                left.append(name)
            elif statuses[name] is JobStatus.CANCELLED:
                left.append(name)
    return cancelled


def _read_statuses(job_ids: Sequence[str]) -> Protocol[dict[str, JobStatus | None]]:
    statuses: dict[str, JobStatus | None] = {}
    for some in slices(job_ids, MAX_JOBS_A_READ):
        replies = yield from send(*(("HGET", job_key(job_id), "status") for job_id in some))
        for job_id, status in zip(some, replies, strict=True):
            statuses[job_id] = parse_status(status) if status is not None else None
    return statuses
