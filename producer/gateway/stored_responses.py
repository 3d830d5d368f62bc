"""Earlier responses: each is made of a job's record, its stored request and its result; nothing else is kept.

So a response is kept for as long as its job's result. For a caller, the responses of others do not exist.
"""

import asyncio
import logging
from contextlib import suppress
from dataclasses import replace
from http import HTTPStatus
from typing import Any

from pydantic import ValidationError

from producer.contract import Choice, ErrorCode, JobRequest, Message, Result, keys
from producer.errors import JobFailedError, JobNotFoundError, ResultStoreError, ResultTimeoutError
from producer.gateway.auth import Caller
from producer.gateway.context import GatewayContext
from producer.gateway.errors import ApiError
from producer.gateway.job_records import JobRecord
from producer.openai.request import OpenAIRequest
from producer.openai.responses.body import RESPONSE_PREFIX, ResponseFrame
from producer.operations import send
from producer.outcome import JobStatus, read_line
from producer.rq_names import job_key, rq_results_key
from producer.stored_request import read_fields
from producer.stored_results import delete_object

DELETE_SECONDS = 10.0  # that a deletion waits for the end of a job that it has cancelled

_STATUSES = {JobStatus.WAITING: "queued", JobStatus.QUEUED: "queued", JobStatus.RUNNING: "in_progress"}

_log = logging.getLogger(__name__)


async def find_response(context: GatewayContext, caller: Caller, response_id: str) -> ResponseFrame:
    """Raises ApiError (404), also for one of somebody else, and for one that was not to be stored."""
    job_id = response_id.removeprefix(RESPONSE_PREFIX)
    record = await find_record(context, caller, job_id) if job_id != response_id else None
    request = await read_request(context, job_id) if record is not None else None
    if record is not None and request is not None:
        return record.frame(job_id, request)
    hours = keys.RESULT_TTL_SECONDS // 3600
    message = f"there is no response {response_id:.100}; responses are kept for {hours} h after their end"
    raise ApiError(HTTPStatus.NOT_FOUND, "response_not_found", message)


async def find_record(context: GatewayContext, caller: Caller, job_id: str) -> JobRecord | None:
    """The record of a stored response that the caller may see. Nothing else of its job may be left."""
    record = await context.records.read(job_id) if job_id.isascii() else None  # others Redis may not even take
    if record is None or not caller.may_see(record.key_id) or record.response is None or not record.response.store:
        return None
    return record


async def read_request(context: GatewayContext, job_id: str) -> JobRequest | None:
    """None where nothing is left of the job."""
    [data] = await context.redis.run(send(("HGET", job_key(job_id), "data")))
    if data is None:
        return None
    try:
        return await context.bodies.run(len(data), lambda: JobRequest.model_validate(read_fields(data)))
    except ValidationError:
        return None


async def show_response(context: GatewayContext, frame: ResponseFrame) -> dict[str, Any]:
    """The response as it stands."""
    status = await context.client.status(frame.job_id)
    if not status.has_ended:
        return frame.body(_STATUSES[status])
    return frame.body_of(await outcome(context, frame.job_id))


async def outcome(context: GatewayContext, job_id: str, timeout: float | None = None) -> Result:
    """The result of a job that has ended, also of one that failed. Raises JobFailedError if the result can never be
    read, ResultStoreError if its store is away, ResultTimeoutError, JobNotFoundError."""
    try:
        return await context.client.result(job_id, timeout=timeout or context.settings.request_timeout_seconds)
    except JobFailedError as error:
        if error.error.code is ErrorCode.RESULT_STORE_ERROR:
            raise
        return error.result or Result(job_id=job_id, status="failed", error=error.error)


async def delete_response(context: GatewayContext, job_id: str) -> None:
    """Cancel the response's job and delete all that is kept of it, the result's object in a store included. If the job
    does not end in time, its keys expire by themselves, but that object stays. Raises ResultStoreError if the object
    cannot be deleted; then the response still exists."""
    with suppress(JobNotFoundError):
        await context.client.cancel(job_id)
    try:
        await outcome(context, job_id, DELETE_SECONDS)
    except ResultTimeoutError:
        _log.warning("action=response_data_left job_id=%s", job_id)
        await context.records.forget(job_id)
        return
    except (JobNotFoundError, JobFailedError, ResultStoreError):
        pass  # nobody wants to read it
    line = await context.redis.run(read_line(job_id))
    if line is not None and line.stored is not None:
        await asyncio.to_thread(delete_object, line.stored, context.settings.s3_endpoint_url)
    await context.records.forget(job_id)
    names = (job_key(job_id), rq_results_key(job_id), keys.result_key(job_id), keys.stream_key(job_id))
    await context.redis.run(send(("DEL", *names)))


async def check_has_events(context: GatewayContext, job_id: str) -> None:
    """Raises ApiError, where the stream is no longer there."""
    status = await context.client.status(job_id)
    [is_there] = await context.redis.run(send(("EXISTS", keys.stream_key(job_id))))
    if not is_there and status.has_ended:
        hours = keys.STREAM_TTL_SECONDS // 3600
        message = f"starting_after: a response's events are kept for {hours} h after its end; get it whole"
        raise ApiError(HTTPStatus.NOT_FOUND, "events_expired", message, param="starting_after")


async def continue_response(
    context: GatewayContext, caller: Caller, asked: OpenAIRequest, response_id: str
) -> tuple[OpenAIRequest, int]:
    """The request with the earlier response's messages and answer before it, and the bytes that these add. Raises
    ApiError."""
    try:
        frame = await find_response(context, caller, response_id)
    except ApiError as error:
        raise _not_to_be_continued("previous_response_not_found", str(error)) from error
    status = await context.client.status(frame.job_id)
    if not status.has_ended:
        rule = f"response {response_id:.100} has not ended; wait for it, or cancel it"
        raise _not_to_be_continued("previous_response_not_finished", rule)
    result = await outcome(context, frame.job_id)
    if result.status != "finished" or not result.choices:
        rule = f"response {response_id:.100} was {result.status}, and has no answer to go on from; ask it again"
        raise _not_to_be_continued("previous_response_failed", rule)
    earlier = (*input_messages(frame), _answer(result.choices[0]))
    [job], own = asked.jobs, asked.jobs[0].messages or []
    assert asked.response is not None
    num_instructions = int(asked.response.has_instructions)
    messages = [*own[:num_instructions], *earlier, *own[num_instructions:]]
    num_bytes = sum(len(message.model_dump_json()) for message in earlier)
    response = asked.response.model_copy(update={"earlier": (*frame.asked.earlier, frame.response_id)})
    return replace(asked, jobs=[job.model_copy(update={"messages": messages})], response=response), num_bytes


async def continue_again(context: GatewayContext, asked: OpenAIRequest, job_id: str) -> OpenAIRequest | None:
    """The request with the same earlier messages as the existing job, even if the earlier response is gone by now. None
    if there is no such job, or its request was another."""
    assert asked.response is not None
    record, known = await context.records.read(job_id), await read_request(context, job_id)
    if record is None or record.response is None or known is None:
        return None
    if record.response.previous_response_id != asked.response.previous_response_id:
        return None
    [job], messages = asked.jobs, known.messages or []
    num_instructions, own = int(asked.response.has_instructions), job.messages or []
    num_earlier = len(messages) - len(own)
    if [*messages[:num_instructions], *messages[num_instructions + num_earlier :]] != own:
        return None
    response = asked.response.model_copy(update={"earlier": record.response.earlier})
    return replace(asked, jobs=[job.model_copy(update={"messages": messages})], response=response)


def input_messages(frame: ResponseFrame) -> list[Message]:
    """The messages that the response answers: earlier responses included, its instructions not."""
    return (frame.request.messages or [])[int(frame.asked.has_instructions) :]


def _answer(choice: Choice) -> Message:
    """Raises ApiError."""
    content = choice.text if choice.text or not choice.tool_calls else None
    fields = {"content": content, "tool_calls": choice.tool_calls, "reasoning": choice.reasoning}
    try:
        return Message.model_validate({"role": "assistant", **fields})
    except ValidationError as error:
        rule = "the response ends within a call that was cut off; send the items to go on from as input"
        raise _not_to_be_continued("previous_response_incomplete", rule) from error


def _not_to_be_continued(code: str, rule: str) -> ApiError:
    param = "previous_response_id"
    return ApiError(HTTPStatus.BAD_REQUEST, code, f"{param}: {rule}", param=param)
