"""Everything that goes wrong, as OpenAI's clients expect it: a status, and `{"error": {message, type, param, code}}`.

Owns the HTTP status of every error and whether a client should try again. OpenAI's clients repeat 408, 409, 429 and 5xx
by themselves, without an idempotency key: where a repetition could make a second job out of one request, the header
`x-should-retry: false` stops them.
"""

import logging
from collections.abc import Mapping
from http import HTTPStatus
from types import MappingProxyType
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from producer.contract import ErrorCode, ErrorInfo
from producer.contract.problems import cut
from producer.errors import (
    FileStoreError,
    InvalidJobError,
    JobFailedError,
    JobNotFoundError,
    PromptmillError,
    RedisUnavailableError,
    ResultStoreError,
    ResultTimeoutError,
)
from producer.openai.request import in_callers_words
from producer.openai.responses.request import RESPONSES_URL

CLIENT_CLOSED_REQUEST = 499  # what is logged where the client went away before an answer

_REPEATED = (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.CONFLICT)  # below 500, of those that a job can end with

MAX_MESSAGE_CHARS, MAX_PARAM_CHARS = 4000, 200  # they may quote what was sent

# OpenAI's services that do not exist here, and what to use instead.
_INSTEAD = {
    ("/assistants", "/threads", "/conversations"): f"ask {RESPONSES_URL} instead, responses.create()",
    ("/uploads",): "send the file whole, to /v1/files, files.create()",
    ("/responses/compact",): f"ask {RESPONSES_URL} for a summary, and go on from that, responses.create()",
    ("/responses/input_tokens",): f"a response's usage counts them, ask {RESPONSES_URL}, responses.create()",
}

_log = logging.getLogger(__name__)


class ApiError(Exception):
    """An answer that is an error. `should_retry`: None leaves it to the client's own rule for the status."""

    def __init__(
        self,
        status: HTTPStatus,
        code: str,
        message: str,
        *,
        param: str | None = None,
        should_retry: bool | None = None,
        retry_after_seconds: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(_writable(cut(message, MAX_MESSAGE_CHARS)))
        self.status = status
        self.code = code
        self.param = _writable(cut(param, MAX_PARAM_CHARS)) if param is not None else None
        self.headers = dict(headers or {})
        if should_retry is not None:
            self.headers["x-should-retry"] = "true" if should_retry else "false"
        if retry_after_seconds is not None:
            self.headers["retry-after"] = str(max(1, round(retry_after_seconds)))

    @property
    def body(self) -> dict[str, Any]:
        error = {"message": str(self), "type": _type_of(self.status), "param": self.param, "code": self.code}
        return {"error": error}

    def with_headers(self, **headers: str) -> "ApiError":
        self.headers.update({name.replace("_", "-"): value for name, value in headers.items()})
        return self


def invalid_request(message: str, param: str | None = None) -> ApiError:
    """A request that breaks a rule; `message` begins with the field's name, which `param` repeats."""
    return ApiError(HTTPStatus.BAD_REQUEST, ErrorCode.INVALID_REQUEST, message, param=param)


def from_info(error: ErrorInfo, *, finds_same_job: bool = False) -> ApiError:
    """The error of a job that ended without an answer. The job is over, so trying again makes no second one.

    `finds_same_job`: the same request again would find this very job.
    """
    status = error.code.http_status
    may_repeat = None if status < 500 and status not in _REPEATED else error.retryable
    if finds_same_job:
        may_repeat = False
    return ApiError(status, str(error.code), error.message, param=error.param, should_retry=may_repeat)


def from_client_error(
    error: PromptmillError,
    callers_names: Mapping[str, str] = MappingProxyType({}),
    *,
    first_index: int = 0,
    finds_same_job: bool = False,
) -> ApiError:
    """The client's error, about the fields as the caller wrote them (`in_callers_words`). `finds_same_job`: see
    `from_info`."""
    match error:
        case InvalidJobError():
            return from_info(error.info)
        case JobFailedError():
            info = in_callers_words(error.error, callers_names, first_index=first_index)
            return from_info(info, finds_same_job=finds_same_job)
        case JobNotFoundError():
            return from_info(ErrorInfo(code=ErrorCode.JOB_NOT_FOUND, message=str(error)))
        case ResultTimeoutError():
            return ApiError(HTTPStatus.REQUEST_TIMEOUT, ErrorCode.TIMEOUT, str(error), should_retry=False)
        case ResultStoreError():
            code = ErrorCode.RESULT_STORE_ERROR
            return ApiError(HTTPStatus.SERVICE_UNAVAILABLE, code, str(error), retry_after_seconds=2)
        case FileStoreError():
            return ApiError(HTTPStatus.SERVICE_UNAVAILABLE, "file_store_error", str(error), retry_after_seconds=2)
        case RedisUnavailableError():
            message = "the queue cannot be reached; try again later"
            return ApiError(HTTPStatus.SERVICE_UNAVAILABLE, "queue_unavailable", message, retry_after_seconds=2)
    return ApiError(HTTPStatus.INTERNAL_SERVER_ERROR, ErrorCode.INTERNAL, str(error))


def to_response(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body, status_code=error.status, headers=error.headers)


def install_handlers(app: FastAPI) -> None:
    """Every error gets OpenAI's shape: ours, the framework's, and unexpected ones."""

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> JSONResponse:
        return to_response(error)

    @app.exception_handler(PromptmillError)
    async def client_error(request: Request, error: PromptmillError) -> JSONResponse:
        if isinstance(error, RedisUnavailableError):
            _log.warning("action=redis_unavailable error=%s", error)
        return to_response(from_client_error(error))

    @app.exception_handler(RequestValidationError)
    async def bad_parameter(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        param = ".".join(str(part) for part in first["loc"][1:]) or None
        message = f"{param}: {first['msg']}" if param else str(first["msg"])
        return to_response(invalid_request(message, param))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        status = HTTPStatus(error.status_code)
        message = f"{request.method} {request.url.path:.200}: {status.phrase.lower()}"
        if (remedy := _instead(request)) is not None:
            message += f"; {remedy} in OpenAI's client"
        elif status == HTTPStatus.NOT_FOUND:
            message += _what_is_served(request)
        elif status == HTTPStatus.METHOD_NOT_ALLOWED and error.headers:
            message += f"; it takes {error.headers['Allow']}"
        return to_response(ApiError(status, status.name.lower(), message, headers=error.headers))

    @app.exception_handler(ClientDisconnect)
    async def client_is_gone(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=CLIENT_CLOSED_REQUEST)  # in the middle of its body: nobody reads this

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        return to_response(unexpected_error())


def _instead(request: Request) -> str | None:
    path = request.url.path.removeprefix("/v1")
    return next((remedy for begins, remedy in _INSTEAD.items() if path.startswith(begins)), None)


def _what_is_served(request: Request) -> str:
    """The remedy for an unknown path, which mostly comes of a client's base URL."""
    served = sorted({path for path in request.app.openapi()["paths"] if path.startswith("/v1/") and "{" not in path})
    path = request.url.path
    meant = next((known for known in served if path in (known.removeprefix("/v1"), f"/v1{known}")), None)
    if meant is not None:
        return f"; it is {meant} here: give clients a base URL that ends in /v1"
    return f"; text is read and written here: served are {', '.join(served)}" if path.startswith("/v1/") else ""


def unexpected_error() -> ApiError:
    """A fault of ours, without details: these are in the log, with the request's id."""
    message = "the gateway failed; its log says why, under this response's x-request-id"
    return ApiError(HTTPStatus.INTERNAL_SERVER_ERROR, ErrorCode.INTERNAL, message, should_retry=False)


def _writable(text: str) -> str:
    """With lone surrogates escaped: a body can contain them, and they have no UTF-8 form."""
    return text.encode("utf-8", "backslashreplace").decode()


def _type_of(status: HTTPStatus) -> str:
    special = {
        HTTPStatus.UNAUTHORIZED: "authentication_error",
        HTTPStatus.FORBIDDEN: "permission_error",
        HTTPStatus.TOO_MANY_REQUESTS: "rate_limit_error",
    }
    return special.get(status, "invalid_request_error" if status < 500 else "server_error")
