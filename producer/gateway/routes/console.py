"""/console/…: what the console's page asks for beside the public API. Bodies and rules are those of its own version."""

from collections.abc import Awaitable, Callable
from importlib.metadata import version
from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from producer.errors import JobNotFoundError
from producer.gateway.auth import Authenticated, Caller, Operator
from producer.gateway.console.bodies import (
    ActionResult,
    ActionResults,
    JobDetail,
    JobIds,
    JobList,
    JobState,
    Point,
    Series,
    Session,
)
from producer.gateway.console.chunk_events import ChunkEvents
from producer.gateway.console.job_lists import JobLists, scope_of
from producer.gateway.console.result_series import BUCKET_SECONDS, Bucket, merged, percentile
from producer.gateway.context import Context, GatewayContext
from producer.gateway.event_stream import EventStream
from producer.gateway.job_stream import JobStream
from producer.subscription import CURSOR_PATTERN

MAX_JOBS = 200
_IDS_BODY = {"requestBody": {"required": True, "content": {"application/json": {"schema": JobIds.model_json_schema()}}}}

Step = Annotated[int, Query(ge=BUCKET_SECONDS, le=600, multiple_of=BUCKET_SECONDS)]  # seconds


router = APIRouter(prefix="/console", tags=["console"])


def _get_lists(context: Context) -> JobLists:
    return JobLists(context.client, context.redis, context.records, context.follower.ended)


Lists = Annotated[JobLists, Depends(_get_lists)]


@router.get("/session")
async def get_session(caller: Authenticated) -> Session:
    """Who the caller is, and what that allows."""
    key = caller.key
    return Session(
        version=version("promptmill"),
        key_id=caller.key_id,
        key_name=key.name if key is not None else None,
        tenant=key.tenant if key is not None else None,
        models=key.models if key is not None else [],
        is_operator=caller.is_operator,
        scope=scope_of(caller),
    )


@router.get("/series")
async def get_series(context: Context, caller: Operator, step: Step = 30, queue: str | None = None) -> Series:
    """Throughput and latency of the last hour, in steps of so many seconds; of one queue, or of all together."""
    follower = context.follower
    begin, buckets = follower.series.read(follower.now(), step, queue)
    return Series(
        begin=begin,
        step_seconds=step,
        is_complete=follower.has_caught_up,
        queues=follower.series.queues,
        points=[_point(bucket) for bucket in buckets],
        window=_point(merged(buckets)),
    )


@router.get("/jobs")
async def list_jobs(
    caller: Authenticated,
    lists: Lists,
    state: JobState = "ended",
    limit: Annotated[int, Query(ge=1, le=MAX_JOBS)] = 50,
) -> JobList:
    """The jobs in a state that the caller may see, the last first; of those that wait, the next first."""
    return JobList(scope=scope_of(caller), jobs=await lists.read(caller, state, limit))


@router.get("/jobs/{job_id}")
async def get_job(context: Context, caller: Authenticated, lists: Lists, job_id: str) -> JobDetail:
    """A job, with what it asked for."""
    await _check_visible(context, caller, job_id)
    detail = await lists.rows.read_detail(job_id)
    if detail is None:
        raise JobNotFoundError.unknown(job_id)
    return detail


@router.get("/jobs/{job_id}/stream", response_class=Response, responses={200: {"content": {"text/event-stream": {}}}})
async def stream_job(
    context: Context,
    caller: Authenticated,
    job_id: str,
    after: Annotated[str | None, Query(pattern=f"^{CURSOR_PATTERN}$")] = None,
) -> Response:
    """The job's output as events: from its beginning, or behind the cursor that an event carried."""
    await _check_visible(context, caller, job_id)
    await context.client.status(job_id)  # a job of which nothing is left is not found, before a stream begins
    job = context.client.job(job_id)
    stream = JobStream(job, ChunkEvents(), None, after=after, shows_resets=True)
    return EventStream([stream], context)


@router.post("/jobs/retry", openapi_extra=_IDS_BODY)
async def retry_jobs(context: Context, caller: Authenticated, request: Request) -> ActionResults:
    """Put failed jobs back onto their queues, to start over."""
    return await _do_each(context, caller, request, context.client.retry, "it has not failed")


@router.post("/jobs/cancel", openapi_extra=_IDS_BODY)
async def cancel_jobs(context: Context, caller: Authenticated, request: Request) -> ActionResults:
    """Cancel jobs, queued or running."""
    return await _do_each(context, caller, request, context.client.cancel, "it had ended before")


async def _do_each(
    context: GatewayContext, caller: Caller, request: Request, do: Callable[[str], Awaitable[bool]], why_not: str
) -> ActionResults:
    results = []
    for job_id in (await _read_ids(context, request)).job_ids:
        try:
            await _check_visible(context, caller, job_id)
            is_done = await do(job_id)
            results.append(ActionResult(job_id=job_id, is_done=is_done, reason=None if is_done else why_not))
        except JobNotFoundError as error:
            results.append(ActionResult(job_id=job_id, is_done=False, reason=str(error)))
    return ActionResults(jobs=results)


async def _read_ids(context: GatewayContext, request: Request) -> JobIds:
    """Raises ApiError, RequestValidationError. Read as the API's bodies are: browsers ask before they send such a one
    to another site."""
    try:
        return await context.bodies.read(request, JobIds.model_validate)
    except ValidationError as error:
        raise RequestValidationError([{**wrong, "loc": ("body", *wrong["loc"])} for wrong in error.errors()]) from error


async def _check_visible(context: GatewayContext, caller: Caller, job_id: str) -> None:
    """Raises JobNotFoundError, also for a job of somebody else."""
    if not caller.is_operator:
        record = await context.records.read(job_id)
        if record is None or not caller.may_see(record.key_id):
            raise JobNotFoundError.unknown(job_id)


def _point(bucket: Bucket) -> Point:
    return Point(
        finished=bucket.num_finished,
        failed=bucket.num_failed,
        cancelled=bucket.num_cancelled,
        prompt_tokens=bucket.num_prompt_tokens,
        output_tokens=bucket.num_output_tokens,
        first_token_p50=percentile(bucket.first_token, 0.50),
        first_token_p95=percentile(bucket.first_token, 0.95),
        total_p50=percentile(bucket.total, 0.50),
        total_p95=percentile(bucket.total, 0.95),
    )
