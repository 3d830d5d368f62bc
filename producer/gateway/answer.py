"""Answers that are not streamed: waits for a request's jobs until they end, the client leaves, the time is over or the
process stops."""

import asyncio
import logging
from collections.abc import Iterable, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from starlette.types import Receive

from producer.contract import ErrorCode, ErrorInfo, Result, Usage
from producer.end_tasks import end_tasks
from producer.errors import JobFailedError, PromptmillError, ResultStoreError
from producer.gateway.acceptance import AcceptedRequest
from producer.gateway.context import GatewayContext
from producer.gateway.errors import CLIENT_CLOSED_REQUEST, ApiError, from_client_error, from_info
from producer.job import AsyncJob
from producer.openai.embeddings import EMBEDDINGS_URL
from producer.openai.response import add_usage, response_body

_log = logging.getLogger(__name__)


async def answer(context: GatewayContext, accepted: AcceptedRequest, request: Request) -> Response:
    """The response, or an empty one for a client that has gone. Raises ApiError."""
    try:
        results = await _wait(context, accepted, request.receive)
    except PromptmillError as error:
        if isinstance(error, JobFailedError) and len(accepted.jobs) == 1:  # the usage of several jobs is not known here
            await accepted.settle(context, error.result.usage if error.result is not None else Usage())
        raise _in_callers_words(error, accepted).with_headers(**accepted.headers) from error
    except ApiError as error:
        raise error.with_headers(**accepted.headers) from error
    if results is None:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    await accepted.settle(context, add_usage([result.usage for result in results]))
    for result in results:
        if result.status != "finished":
            raise from_info(cancelled_elsewhere(result.job_id)).with_headers(**accepted.headers)
    if accepted.asked.url == EMBEDDINGS_URL:  # writing a million numbers takes a second
        return await asyncio.to_thread(_render, accepted, results)
    return _render(accepted, results)


def _render(accepted: AcceptedRequest, results: list[Result]) -> Response:
    asked = accepted.asked
    if asked.response is not None:
        return JSONResponse(accepted.frame.body_of(results[0]), headers=accepted.headers)
    body = response_body(asked.url, results, created=accepted.created, encoding=asked.encoding)
    return JSONResponse({**body, "model": accepted.model}, headers=accepted.headers)


def _in_callers_words(error: PromptmillError, accepted: AcceptedRequest) -> ApiError:
    jobs = zip(accepted.jobs, accepted.records, strict=True)
    first_index = next((record.first_index for job, record in jobs if job.id == getattr(error, "job_id", None)), 0)
    names = accepted.asked.callers_names
    told = from_client_error(error, names, first_index=first_index, finds_same_job=accepted.is_keyed)
    if isinstance(error, ResultStoreError) and not accepted.is_keyed:  # asked again, it would be another job
        told.headers["x-should-retry"] = "false"
    return told


async def _wait(context: GatewayContext, accepted: AcceptedRequest, receive: Receive) -> list[Result] | None:
    """The results in the order of the jobs. None: the client has gone."""
    results = asyncio.create_task(_gather(accepted.jobs))
    gone = asyncio.create_task(wait_until_gone(receive))
    drained = asyncio.create_task(context.drain.over.wait())
    timeout = context.settings.request_timeout_seconds
    try:
        waited_for: set[asyncio.Task[Any]] = {results, gone, drained}
        await asyncio.wait(waited_for, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if results.done():
            try:
                return results.result()
            except PromptmillError:
                if not accepted.is_detached:
                    await cancel_jobs(accepted.jobs)  # one of several has failed: nobody waits for the others
                raise
        if drained.done():
            raise stopping(f"/v1/jobs/{job.id}" for job in accepted.jobs)
        if not accepted.is_detached:
            await cancel_jobs(accepted.jobs)
        if gone.done():
            return None
        fate = "its job goes on" if accepted.is_detached else "its job was cancelled"
        message = f"no complete answer within {timeout:g} s; {fate}"
        raise ApiError(HTTPStatus.REQUEST_TIMEOUT, ErrorCode.TIMEOUT, message, should_retry=False)
    finally:
        await end_tasks(results, gone, drained)


async def _gather(jobs: Sequence[AsyncJob]) -> list[Result]:
    return await asyncio.gather(*(job.result() for job in jobs))


async def wait_until_gone(receive: Receive) -> None:
    """Until the client closes the connection. The request's body has been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def cancel_jobs(jobs: Sequence[AsyncJob]) -> None:
    """Cancel jobs that nobody waits for any more. Those that have ended stay as they are."""
    for job in jobs:
        try:
            await job.cancel()
        except PromptmillError as error:
            _log.warning("action=cancel_failed job_id=%s error=%s", job.id, type(error).__name__)


def cancelled_elsewhere(job_id: str) -> ErrorInfo:
    return ErrorInfo(code=ErrorCode.CANCELLED, message=f"job {job_id} was cancelled before its end")


def stopping(paths: Iterable[str]) -> ApiError:
    """The error of a process that stops while the jobs continue. `paths`: where to read the rest of the answer."""
    message = f"this gateway is stopping; to read on, GET {', '.join(paths)} from any other gateway"
    return ApiError(HTTPStatus.SERVICE_UNAVAILABLE, "gateway_stopping", message, should_retry=False)
