"""/v1/jobs/{id}: what has become of a request, its stream again from a cursor on, and its end."""

from http import HTTPStatus
from typing import Annotated, Any

from fastapi import APIRouter, Query, Response

from producer.errors import JobFailedError, JobNotFoundError
from producer.gateway.auth import Authenticated, Caller
from producer.gateway.chunk_bodies import ChunkRenderer
from producer.gateway.context import Context, GatewayContext
from producer.gateway.errors import ApiError
from producer.gateway.event_stream import EventStream
from producer.gateway.job_records import JobRecord
from producer.gateway.job_stream import BEGINNING, JobStream
from producer.gateway.stored_responses import outcome, read_request
from producer.openai.request import in_callers_words
from producer.openai.response import RESPONSE_PREFIXES, error_body, response_body
from producer.openai.responses.request import RESPONSES_URL
from producer.subscription import CURSOR_PATTERN

router = APIRouter(tags=["jobs"])


@router.get("/v1/jobs/{job_id}")
async def get_job(context: Context, caller: Authenticated, job_id: str) -> dict[str, Any]:
    """Where a job stands; its answer once it has ended."""
    job_id, record = await _find(context, caller, job_id)
    status = await context.client.status(job_id)
    body = _body(job_id, record, str(status))
    if status.has_ended:
        try:
            result = await outcome(context, job_id)
        except JobFailedError as unreadable:
            return {**body, "error": error_body(unreadable.error)["error"]}
        if record.response is not None and (request := await read_request(context, job_id)) is not None:
            body["response"] = record.frame(job_id, request).body_of(result)
        elif result.choices or result.embeddings:
            response = response_body(record.url, [result], created=record.created)
            body["response"] = {**response, "id": record.response_id, "model": record.model}
        if result.error is not None:
            error = in_callers_words(result.error, record.callers_names, first_index=record.first_index)
            body["error"] = error_body(error)["error"]
    return body


@router.delete("/v1/jobs/{job_id}")
async def delete_job(context: Context, caller: Authenticated, job_id: str) -> dict[str, Any]:
    """Cancel a job, queued or running. One that has ended stays as it is."""
    job_id, record = await _find(context, caller, job_id)
    is_cancelled = await context.client.cancel(job_id)
    status = "cancelled" if is_cancelled else str(await context.client.status(job_id))
    return {**_body(job_id, record, status), "cancelled": is_cancelled}


@router.get(
    "/v1/jobs/{job_id}/stream", response_class=Response, responses={200: {"content": {"text/event-stream": {}}}}
)
async def stream_job(
    context: Context,
    caller: Authenticated,
    job_id: str,
    after: Annotated[str | None, Query(pattern=f"^{CURSOR_PATTERN}$")] = None,
) -> Response:
    """The job's stream of events: from its beginning, or behind the cursor that an event carried. Leaving it does not
    cancel the job."""
    job_id, record = await _find(context, caller, job_id)
    if record.response is not None:
        message = f"job {job_id} is a response: GET {RESPONSES_URL}/{record.response_id}?stream=true, if it is stored"
        raise ApiError(HTTPStatus.BAD_REQUEST, "job_is_a_response", message)
    await context.client.status(job_id)  # a job of which nothing is left is not found, before a stream begins
    stream = JobStream(
        context.client.job(job_id),
        ChunkRenderer(job_id, record, includes_usage=True, is_resumed=after not in (None, BEGINNING)),
        context.metrics.token_timer(record.model),
        after=after,
        shows_resets=True,
        callers_names=record.callers_names,
    )
    return EventStream([stream], context)


async def _find(context: GatewayContext, caller: Caller, job_id: str) -> tuple[str, JobRecord]:
    """By its own id or its response's. Raises JobNotFoundError, also for a job of somebody else."""
    for prefix in RESPONSE_PREFIXES:
        job_id = job_id.removeprefix(prefix)
    record = await context.records.read(job_id)
    if record is None or not caller.may_see(record.key_id):
        raise JobNotFoundError.unknown(job_id)
    return job_id, record


def _body(job_id: str, record: JobRecord, status: str) -> dict[str, Any]:
    return {
        "id": job_id,
        "object": "job",
        "status": status,
        "model": record.model,
        "url": record.url,
        "created": record.created,
        "response_id": record.response_id,
        "response": None,
        "error": None,
    }
