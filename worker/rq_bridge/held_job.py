"""How the worker reads RQ's jobs. Anybody may have written them, so nothing in them is trusted or imported."""

import json
from collections.abc import Collection, Mapping
from datetime import UTC, datetime
from typing import Any

import redis
from redis.client import Pipeline
from rq.job import Job, JobStatus
from rq.serializers import JSONSerializer

from producer.contract import ErrorCode
from producer.contract.keys import FAILURE_TTL_SECONDS, JOB_FUNCTION, RESULT_TTL_SECONDS
from producer.contract.packed_field import unpack, unpacks_to_more
from worker.allowed_urls import find_allowed
from worker.claim import Claim
from worker.errors import JobRefusedError

# RQ's own numbers in a record. Larger ones overflow in Redis or in a clock.
_NUMBERS = (
    *("timeout", "result_ttl", "failure_ttl", "ttl", "number_of_retries", "retries_left", "repeats_left"),
    *("_success_callback_timeout", "_failure_callback_timeout", "_stopped_callback_timeout"),
)
_INTERVALS = ("retry_intervals", "repeat_intervals")  # RQ uses one of them when it enqueues the job again
_MAX_NUMBER = 10**10  # three centuries in seconds
MAX_BYTES_PER_TOKEN = 16  # of a prompt as JSON; English text has 4 to 5
MAX_EXTRA_BYTES = 256 << 10  # for metadata and the like
MAX_EMBED_CALL_BYTES = 8 << 20  # of a list of inputs: twice the body that a gateway takes by default

_DATE_FIELDS = (b"created_at", b"enqueued_at", b"started_at", b"ended_at", b"last_heartbeat")


def max_call_bytes(context_length: int) -> int:
    """The largest size of a job's function and arguments; no prompt that fits the context needs more."""
    return context_length * MAX_BYTES_PER_TOKEN + MAX_EXTRA_BYTES


class HeldJob(Job):  # type: ignore[misc]  # RQ's classes are untyped here
    """A job whose status is only written in a fenced transaction, as are its webhooks (`Outcomes.add_webhooks`)."""

    def restore(self, raw_data: Mapping[bytes, bytes]) -> None:
        """As RQ's, but parses dates faster: that takes half of RQ's time here."""
        dates = {name: date for name in _DATE_FIELDS if (date := _parse_date(raw_data.get(name, b""))) is not None}
        super().restore({name: value for name, value in raw_data.items() if name not in dates})
        for name, date in dates.items():
            setattr(self, name.decode(), date)

    def set_status(self, status: JobStatus, pipeline: Pipeline | None = None) -> None:
        if pipeline is None:
            self._status = status  # RQ's retry() writes it again, in its pipeline
        else:
            super().set_status(status, pipeline=pipeline)

    def send_webhooks(self, status: str | JobStatus, *, exc_string: str | None = None) -> None:
        """Does nothing: RQ would wait for the receivers' answers here, and not retry."""


class JobReader:
    """Makes RQ job objects from claims. Thread-safe."""

    def __init__(
        self,
        connection: redis.Redis,
        *,
        allowed_callbacks: Collection[str],
        allowed_webhooks: Collection[str],
        max_call_bytes: int,
    ) -> None:
        """`max_call_bytes`: the limit for a job's function and arguments, decompressed."""
        self._connection = connection
        self._allowed_callbacks = frozenset(allowed_callbacks)
        self._allowed_webhooks = tuple(allowed_webhooks)
        self._max_call_bytes = max_call_bytes

    def restore(self, claim: Claim) -> tuple[Job, JobRefusedError | None]:
        """RQ's job object, and the error if it cannot be run. Callbacks and webhooks that are not allowed are removed
        from it."""
        job, problem = self._new_job(claim), None
        packed = [name for name in (b"data", b"exc_info") if name in claim.fields]
        too_large = [name for name in packed if self._exceeds_limit(claim.fields[name])]
        fields = claim.fields | dict.fromkeys(too_large, b"")  # RQ would decompress all of them
        if b"data" in too_large:
            problem = self._is_too_large()
        try:
            job.restore(fields)
        except Exception as error:  # of any type: RQ parses untrusted data here
            job, problem = self._new_job(claim), JobRefusedError(_what_is_malformed(claim, error))
            job.data = fields.get(b"data", b"")
        problem = self._drop_absurd(job) or problem
        job.origin = claim.queue
        job.started_at = datetime.fromtimestamp(claim.claimed_at, UTC)
        if job.failure_ttl is None:
            job.failure_ttl = FAILURE_TTL_SECONDS  # RQ's default is a year, and for ever for its results
        return job, self._strip(job) or problem

    def _new_job(self, claim: Claim) -> Job:
        job = HeldJob(claim.job_id, connection=self._connection)
        job.serializer = JSONSerializer  # set here: as an argument, RQ would check it for each job
        return job

    def _drop_absurd(self, job: Job) -> JobRefusedError | None:
        """Remove numbers with which no job could end, not even as failed."""
        absurd = [name for name in _NUMBERS if (value := getattr(job, name)) is not None and abs(value) > _MAX_NUMBER]
        absurd += [name for name in _INTERVALS if not _are_seconds(getattr(job, name))]
        for name in absurd:
            setattr(job, name, None)
        if not absurd:
            return None
        names = ", ".join(name.lstrip("_") for name in absurd)
        return JobRefusedError(f"the job's RQ record is malformed ({names}: must be whole numbers up to {_MAX_NUMBER})")

    def _strip(self, job: Job) -> JobRefusedError | None:
        """Remove callbacks and webhooks that are not on the allow-lists, so that they are not called even when the job
        fails."""
        refused = []
        for name in ("_success_callback_name", "_failure_callback_name", "_stopped_callback_name"):
            callback = getattr(job, name)
            if callback and callback not in self._allowed_callbacks:
                refused.append(f"callback {callback!r} (see --callbacks)")
                setattr(job, name, None)
        allowed = [hook for hook in job.webhooks if self.find_allowed(hook.url) is not None]
        refused += [f"webhook {hook.url!r} (see --webhooks)" for hook in job.webhooks if hook not in allowed]
        job.webhooks = allowed
        return JobRefusedError(f"the worker does not allow {', '.join(refused)}") if refused else None

    def find_allowed(self, url: str) -> str | None:
        """The entry of the webhooks' allow-list that the URL equals or is below."""
        return find_allowed(url, self._allowed_webhooks)

    def read_kwargs(self, job: Job) -> dict[str, Any]:
        """The fields of the request. Raises JobRefusedError for anything but a call of the one function that is
        served."""
        try:
            call = json.loads(job.data)
        except Exception as error:  # not JSON, not UTF-8, nested too deeply
            raise JobRefusedError(
                "the job's data is not JSON (pickled?): enqueue it with RQ's JSONSerializer"
            ) from error
        if not isinstance(call, list) or len(call) != 4 or call[1] is not None:
            raise JobRefusedError(f'the job\'s data must be the JSON list ["{JOB_FUNCTION}", null, [], {{fields}}]')
        function, _, args, kwargs = call
        if function != JOB_FUNCTION:
            raise JobRefusedError(f"function {str(function)[:100]!r} is not served here; enqueue {JOB_FUNCTION!r}")
        if args:
            raise JobRefusedError("positional arguments are not taken; pass the request's fields by keyword")
        if not isinstance(kwargs, dict):
            raise JobRefusedError("the request's fields must be a JSON object")
        return kwargs

    def _exceeds_limit(self, field: bytes) -> bool:
        """Whether the field is too large. For a job that embeds the limit is higher, since each input may fill the
        context; our clients write its task first."""
        max_bytes = self._max_call_bytes
        begin = unpack(field, max_bytes + 1)
        if b'"embed"' in begin and max_bytes < MAX_EMBED_CALL_BYTES:
            return unpacks_to_more(field, MAX_EMBED_CALL_BYTES)
        return len(begin) > max_bytes

    def _is_too_large(self) -> JobRefusedError:
        message = f"the request has more than {self._max_call_bytes} bytes, which no context here holds: shorten it"
        return JobRefusedError(message, code=ErrorCode.CONTEXT_LENGTH_EXCEEDED)


def _are_seconds(intervals: object) -> bool:
    if intervals is None:
        return True
    if not isinstance(intervals, list) or not intervals:
        return False
    return all(type(value) is int and 0 <= value <= _MAX_NUMBER for value in intervals)


def _parse_date(text: bytes) -> datetime | None:
    """Parse a date as RQ writes it. None: leave it to RQ's parser."""
    try:
        return datetime.fromisoformat(text[:-1].decode()).replace(tzinfo=UTC) if text[-1:] == b"Z" else None
    except ValueError:
        return None


def timeout_seconds(job: Job) -> float | None:
    """RQ's job timeout, or None."""
    return float(job.timeout) if job.timeout is not None and job.timeout > 0 else None


def will_retry(job: Job) -> bool:
    """Whether RQ enqueues the job again when it fails."""
    return bool(job.should_retry)


def has_extras(job: Job) -> bool:
    """Whether a success writes more than the job's own keys."""
    return bool(
        job._success_callback_name
        or job.repeats_left
        or job.has_rate_limit
        or job.get_result_ttl(RESULT_TTL_SECONDS) == 0
    )


def calls_back(job: Job) -> bool:
    """Whether a callback runs before the commit."""
    return bool(job._success_callback_name or job._failure_callback_name or job._stopped_callback_name)


def _what_is_malformed(claim: Claim, error: Exception) -> str:
    what = str(error) or type(error).__name__
    if b"data" not in claim.fields:
        what = "it has no field data, which holds the request"
    return f"the job's RQ record is malformed ({what})"
