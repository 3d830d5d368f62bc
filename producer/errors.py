"""What the client raises.

PromptmillError
├── InvalidJobError          the request is refused before it is enqueued; `param` names the field
├── SettingsError            a flag or PROMPTMILL_* variable is wrong; names both
├── PortTakenError           somebody else listens where a gateway is to
├── BatchFileError           a batch's input or output file cannot be used; names it
├── ClientClosedError        the client was closed before
├── RedisUnavailableError    Redis cannot be reached at the URL given
│   └── RedisRefusedError    nor later: the login, the rights or TLS are not what it wants, or it is a cluster
├── DurabilityError          Redis did not confirm that what was enqueued is safe; says whether it was enqueued
├── JobNotFoundError         no such job, or its result has expired
├── JobFailedError           the job ended without a full answer; `error` is the contract's ErrorInfo
├── ResultTimeoutError       no result within the timeout; the job goes on
├── ResultStoreError         the result lies in S3 and cannot be read
└── FileStoreError           the store of the gateway's files cannot be read or written
"""

from typing import Self

from producer.contract import ErrorCode, ErrorInfo, Result


class PromptmillError(Exception):
    """Base of everything the client raises."""


class InvalidJobError(PromptmillError):
    """The request breaks the contract; nothing was enqueued."""

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        index: int | None = None,
        code: ErrorCode = ErrorCode.INVALID_REQUEST,
    ) -> None:
        """`param`: the field's path; `index`: which of many requests it is, counted from 0."""
        super().__init__(message)
        self.param = param
        self.index = index
        self.code = code

    @property
    def info(self) -> ErrorInfo:
        """The same as it travels."""
        return ErrorInfo(code=self.code, message=str(self), param=self.param)


class SettingsError(PromptmillError):
    """A setting is wrong; the message names its flag, its variable and the rule."""


class PortTakenError(PromptmillError):
    """Somebody else listens on the port; it may be free later."""


class BatchFileError(PromptmillError):
    """A batch's input or output file cannot be used; the message names it and the remedy."""


class ClientClosedError(PromptmillError):
    """The client was closed: nothing is asked of Redis any more, and nothing was enqueued."""

    def __init__(self) -> None:
        super().__init__("this client was closed; make a new one")


class RedisUnavailableError(PromptmillError):
    """Redis cannot be reached."""


class RedisRefusedError(RedisUnavailableError):
    """Redis does not take us as the URL has it (login, rights, TLS, a cluster): trying again does not help."""


class DurabilityError(PromptmillError):
    """`durable=True`, and Redis cannot promise it, or did not confirm it in time; the message says which."""


class JobNotFoundError(PromptmillError):
    """No job of this id is known, or everything kept of it has expired. `has_ended`: it was run to its end, and it is
    the result that is gone."""

    def __init__(self, job_id: str, message: str, *, has_ended: bool = False) -> None:
        super().__init__(message)
        self.job_id = job_id
        self.has_ended = has_ended

    @classmethod
    def unknown(cls, job_id: str, remedy: str = "") -> Self:
        """Of an id that anybody may have given; `remedy` ends the message."""
        return cls(job_id, f"there is no job {job_id:.100}, or it is no longer kept{remedy}")


class JobFailedError(PromptmillError):
    """The job ended without a full answer. `result`, where there is one, holds the partial output."""

    def __init__(self, job_id: str, error: ErrorInfo, result: Result | None = None) -> None:
        super().__init__(f"job {job_id} failed: {error.message}")
        self.job_id = job_id
        self.error = error
        self.result = result


class ResultTimeoutError(PromptmillError, TimeoutError):
    """The job did not end within the timeout; it goes on, and its result can be asked for again."""


class ResultStoreError(PromptmillError):
    """The result was written to S3 and cannot be read from here; the message names the remedy."""


class FileStoreError(PromptmillError):
    """The store of the gateway's files cannot be read or written; the message names the part or the remedy."""
