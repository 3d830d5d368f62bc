"""Errors as they travel: a closed list of codes, each with the HTTP status a gateway answers with."""

from enum import StrEnum
from http import HTTPStatus

from pydantic import BaseModel, ConfigDict


class ErrorCode(StrEnum):
    """What went wrong, for programs. The message says it for people."""

    INVALID_REQUEST = "invalid_request"
    UNSUPPORTED = "unsupported"
    CONTEXT_LENGTH_EXCEEDED = "context_length_exceeded"
    MODEL_NOT_FOUND = "model_not_found"
    DEADLINE_EXCEEDED = "deadline_exceeded"
    TIMEOUT = "timeout"
    CANCELLED = "cancelled"
    IDEMPOTENCY_CONFLICT = "idempotency_conflict"
    POISON = "poison"
    ENGINE_ERROR = "engine_error"
    RESULT_STORE_ERROR = "result_store_error"
    JOB_NOT_FOUND = "job_not_found"
    INTERNAL = "internal"

    @property
    def http_status(self) -> HTTPStatus:
        return _HTTP_STATUS[self]


_HTTP_STATUS = {
    ErrorCode.INVALID_REQUEST: HTTPStatus.BAD_REQUEST,
    ErrorCode.UNSUPPORTED: HTTPStatus.BAD_REQUEST,
    ErrorCode.CONTEXT_LENGTH_EXCEEDED: HTTPStatus.BAD_REQUEST,
    ErrorCode.MODEL_NOT_FOUND: HTTPStatus.NOT_FOUND,
    ErrorCode.DEADLINE_EXCEEDED: HTTPStatus.REQUEST_TIMEOUT,
    ErrorCode.TIMEOUT: HTTPStatus.REQUEST_TIMEOUT,
    ErrorCode.CANCELLED: HTTPStatus.CONFLICT,
    ErrorCode.IDEMPOTENCY_CONFLICT: HTTPStatus.CONFLICT,
    ErrorCode.POISON: HTTPStatus.INTERNAL_SERVER_ERROR,
    ErrorCode.ENGINE_ERROR: HTTPStatus.INTERNAL_SERVER_ERROR,
    ErrorCode.RESULT_STORE_ERROR: HTTPStatus.BAD_GATEWAY,
    ErrorCode.JOB_NOT_FOUND: HTTPStatus.NOT_FOUND,
    ErrorCode.INTERNAL: HTTPStatus.INTERNAL_SERVER_ERROR,
}


class ErrorInfo(BaseModel):
    """Why a job has no, or only a partial, answer. `param` names the request field at fault, where one is."""

    model_config = ConfigDict(frozen=True, extra="ignore")  # as of all that workers write

    code: ErrorCode
    message: str
    param: str | None = None
    retryable: bool = False


NO_REASON = ErrorInfo(code=ErrorCode.INTERNAL, message="the worker gave no reason")
