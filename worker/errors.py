"""What the worker raises.

WorkerError
├── EmbeddedRedisError     no server binary, or it did not start, or ended by itself
├── StartRefusedError      the surroundings break a promise (eviction policy, bucket, Redis); names the remedy
├── ResultStoreError       the result store cannot be written now; the put may be repeated
├── HandOverError          jobs could not be given back at the end; they return when their leases end
├── JobRefusedError        this job can never run here; carries the contract's error
├── ReplayMismatchError    stored tokens do not come to the stored text here; the job starts over
└── LeaseLostError         another attempt holds the job; what this one had is dropped
"""

from producer.contract import ErrorCode, ErrorInfo


class WorkerError(Exception):
    """Base of everything the worker raises."""


class EmbeddedRedisError(WorkerError):
    """The embedded Redis cannot be started, or has ended by itself."""


class StartRefusedError(WorkerError):
    """The worker does not start, because it could not keep its promises here."""


class ResultStoreError(WorkerError):
    """A result could not be stored. Nothing is lost: the same put may be repeated."""


class HandOverError(WorkerError):
    """The worker ended without giving its jobs back. Nothing is lost: their leases end."""


class JobRefusedError(WorkerError):
    """The job can never run here; it fails with this reason and harms nobody."""

    def __init__(self, message: str, *, param: str | None = None, code: ErrorCode = ErrorCode.INVALID_REQUEST) -> None:
        super().__init__(message)
        self.info = ErrorInfo(code=code, message=message, param=param)


class ReplayMismatchError(WorkerError):
    """Going on would show a subscriber two different answers in one: the job starts over."""

    def __init__(self, job_id: str, index: int) -> None:
        super().__init__(f"the stored tokens of job {job_id}, choice {index}, do not come to its stored text here")


class LeaseLostError(WorkerError):
    """The fence no longer holds this attempt: its outcome must not be written."""

    def __init__(self, job_id: str) -> None:
        super().__init__(f"job {job_id} belongs to another attempt now")
        self.job_id = job_id
