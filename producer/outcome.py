"""How a job ended according to Redis: our result, else RQ's own record of a failure, else that nothing is left.

All who wait for a job poll here when nothing was published for a while: clean-ups publish nothing.
"""

import base64
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeAlias

from pydantic import ValidationError

from producer.cancel import settle_cancelled
from producer.contract import ErrorCode, ErrorInfo, Result, keys
from producer.contract.packed_field import unpack
from producer.errors import JobNotFoundError, ResultStoreError
from producer.operations import Command, Protocol, ReadObjects, send
from producer.rq_names import job_key, rq_results_key
from producer.stored_request import MAX_UNPACKED_BYTES
from producer.stored_results import ObjectRead

Outcome: TypeAlias = Result | JobNotFoundError
"""How a job ended: its result, or that nothing is left of it."""

MAX_REASON_CHARS = 1000  # of another worker's
NUM_LOOKS_BEFORE_GIVING_UP = 2  # an outcome is committed in steps, and one poll may fall between two of them


class JobStatus(StrEnum):
    """A job's state. WAITING: not on its queue yet (RQ's deferred, scheduled, rate-limited)."""

    WAITING = "waiting"
    QUEUED = "queued"
    RUNNING = "running"
    FINISHED = "finished"
    CANCELLED = "cancelled"
    STOPPED = "stopped"
    FAILED = "failed"

    @property
    def has_ended(self) -> bool:
        return self in (JobStatus.FINISHED, JobStatus.CANCELLED, JobStatus.STOPPED, JobStatus.FAILED)

    @property
    def is_waiting(self) -> bool:
        """Whether no worker has taken the job yet."""
        return self in (JobStatus.WAITING, JobStatus.QUEUED)


_FROM_RQ = {
    "queued": JobStatus.QUEUED,
    "started": JobStatus.RUNNING,
    "finished": JobStatus.FINISHED,
    "canceled": JobStatus.CANCELLED,
    "stopped": JobStatus.STOPPED,
    "failed": JobStatus.FAILED,
}


@dataclass(frozen=True, slots=True)
class Look:
    """What one poll of a job found. `status` is None when RQ does not know the job (any more); `attempt` is the last
    one that a worker claimed, 0 before the first."""

    job_id: str
    status: JobStatus | None
    queue: str | None
    has_result: bool
    attempt: int

    @property
    def is_over(self) -> bool:
        """Whether the job has ended for RQ, or RQ does not know it (any more)."""
        return self.status is None or self.status.has_ended

    def has_come_back(self, ended_attempt: int) -> bool:
        """Whether a job whose stream ended in that attempt was enqueued again (by RQ's requeue or Retry)."""
        return self.attempt > ended_attempt or (self.status is not None and self.status.is_waiting)


NUM_LOOK_COMMANDS = 3


def look_commands(job_id: str) -> list[Command]:
    return [
        ("HMGET", job_key(job_id), "status", "origin"),
        ("EXISTS", keys.result_key(job_id)),
        ("GET", keys.attempt_key(job_id)),
    ]


def parse_look(job_id: str, replies: Sequence[Any]) -> Look:
    """Parse the replies to `look_commands`."""
    (status, origin), has_result, attempt = replies
    return Look(
        job_id=job_id,
        status=parse_status(status) if status is not None else None,
        queue=origin.decode() if origin is not None else None,
        has_result=bool(has_result),
        attempt=int(attempt or 0),
    )


def look_at(job_ids: Sequence[str]) -> Protocol[list[Look]]:
    """Poll these jobs in one round trip."""
    if not job_ids:
        return []
    replies = yield from send(*(command for job_id in job_ids for command in look_commands(job_id)))
    some = (replies[at : at + NUM_LOOK_COMMANDS] for at in range(0, len(replies), NUM_LOOK_COMMANDS))
    return [parse_look(job_id, look) for job_id, look in zip(job_ids, some, strict=True)]


def parse_status(status: bytes) -> JobStatus:
    """Our JobStatus for RQ's status."""
    return _FROM_RQ.get(status.decode(errors="replace"), JobStatus.WAITING)


def read_status(job_id: str) -> Protocol[JobStatus]:
    """Raises JobNotFoundError if neither the job nor its result is there."""
    look = parse_look(job_id, (yield from send(*look_commands(job_id))))
    if look.status is not None:
        return look.status
    if look.has_result:
        result = yield from read_line(job_id)
        if result is not None:
            return JobStatus(result.status)
    raise _not_found(job_id)


class OutcomeWatch:
    """Turns polls of one job into its outcome; counts how often a poll found it ended without a result."""

    def __init__(self, job_id: str) -> None:
        self._job_id = job_id
        self._num_empty_looks = 0

    def conclude(self, look: Look) -> Protocol[Result | None]:
        """The result, or None while the job is not over. Raises JobNotFoundError when nothing is left of it."""
        if look.status is not None and not look.status.has_ended:
            self._num_empty_looks = 0
            return None  # even if there is a result: a job that was enqueued again still has its previous one
        if look.has_result:
            result = yield from read_result(self._job_id)
            if result is not None:
                return result
        if look.status is None:
            raise _not_found(self._job_id)
        if look.status is JobStatus.CANCELLED:
            yield from settle_cancelled(self._job_id)
            return (yield from read_result(self._job_id))
        self._num_empty_looks += 1
        if self._num_empty_looks < NUM_LOOKS_BEFORE_GIVING_UP:
            return None
        if look.status is JobStatus.FINISHED:
            message = f"job {self._job_id} has finished, but its result is gone; submit it again"
            raise JobNotFoundError(self._job_id, message, has_ended=True)
        return (yield from read_failure_of_rq(self._job_id))


def read_line(job_id: str) -> Protocol[Result | None]:
    """The result as Redis has it: without its choices if they are in the result store."""
    [value] = yield from send(("GET", keys.result_key(job_id)))
    return parse_line(job_id, value) if value is not None else None


def read_result(job_id: str) -> Protocol[Result | None]:
    """The whole result, also from the result store. Raises JobNotFoundError if it is gone, ResultStoreError if the
    store cannot be read."""
    [result] = yield from read_results([job_id])
    if isinstance(result, JobNotFoundError):
        raise result
    return result


def read_results(job_ids: Sequence[str]) -> Protocol[list[Outcome | None]]:
    """As `read_result`, for many jobs: one round trip to Redis, then parallel reads from the store.

    For a result that is gone the error is returned, and for one that cannot be parsed or may not be read a failed
    result: no job keeps the others from being read.
    """
    if not job_ids:
        return []
    values = yield from send(*(("GET", keys.result_key(job_id)) for job_id in job_ids))
    return (yield from parse_results(job_ids, values))


def parse_results(job_ids: Sequence[str], values: Sequence[bytes | None]) -> Protocol[list[Outcome | None]]:
    """As `read_results`, from the values of the results' keys in Redis."""
    given = zip(job_ids, values, strict=True)
    results = [parse_line(job_id, value) if value is not None else None for job_id, value in given]
    urls = [result.stored for result in results if result is not None and result.stored is not None]
    objects = iter((yield ReadObjects(urls)) if urls else ())
    return [_whole(result, next(objects)) if result is not None and result.stored else result for result in results]


def _whole(result: Result, data: ObjectRead) -> Outcome:
    """The result together with its choices from the store."""
    if isinstance(data, ResultStoreError):
        info = ErrorInfo(code=ErrorCode.RESULT_STORE_ERROR, message=str(data))
        return result.model_copy(update={"status": "failed", "error": info})
    if data is None:
        return JobNotFoundError(
            result.job_id,
            f"job {result.job_id} has ended, but {result.stored} is not there: it was deleted, and the job can be "
            "submitted again, or PROMPTMILL_S3_ENDPOINT_URL names another store",
            has_ended=True,
        )
    whole = _parse(result.job_id, data, f"the object {result.stored}")
    if isinstance(whole, ErrorInfo):
        return result.model_copy(update={"status": "failed", "error": whole})
    return whole.model_copy(update={"stored": result.stored})


def parse_line(job_id: str, value: bytes) -> Result:
    """The result in a value from Redis; a failed one if it cannot be parsed."""
    found = _parse(job_id, value, "what Redis keeps")
    return found if isinstance(found, Result) else Result(job_id=job_id, status="failed", error=found)


def _parse(job_id: str, data: bytes, what: str) -> Result | ErrorInfo:
    """The job's result, or why `data` is not one (from a newer contract, or not written by a worker): reading it again
    would not help."""
    try:
        result = Result.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        fault = ": ".join(filter(None, (".".join(map(str, first["loc"])), first["msg"])))
    else:
        if result.job_id == job_id:
            return result
        fault = f"it is job {result.job_id:.100}'s"
    return ErrorInfo(code=ErrorCode.RESULT_STORE_ERROR, message=f"{what} is not a result of job {job_id}: {fault}")


def read_failure_of_rq(job_id: str) -> Protocol[Result]:
    """The result of a job that RQ itself ended (its clean-up, a foreign worker), with the reason that RQ kept."""
    [legacy, records] = yield from send(
        ("HGET", job_key(job_id), "exc_info"), ("XREVRANGE", rq_results_key(job_id), "+", "-", "COUNT", 1)
    )
    text = ""
    if records and records[0][1].get(b"exc_string"):
        with suppress(ValueError):  # it may be anything
            packed = base64.b64decode(records[0][1][b"exc_string"])
            text = unpack(packed, MAX_UNPACKED_BYTES).decode(errors="replace")
    elif legacy:
        text = unpack(legacy, MAX_UNPACKED_BYTES).decode(errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    message = lines[-1][:MAX_REASON_CHARS] if lines else "RQ ended the job without a reason"
    return Result(job_id=job_id, status="failed", error=ErrorInfo(code=ErrorCode.INTERNAL, message=message))


def _not_found(job_id: str) -> JobNotFoundError:
    hours = keys.RESULT_TTL_SECONDS // 3600
    return JobNotFoundError(job_id, f"there is no job {job_id:.100}; results are kept for {hours} h after a job's end")
