"""From a request's body to jobs on the queue: checked, admitted, recorded, enqueued, in this order.

Whatever is refused is refused before anything is enqueued.
"""

import time
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from uuid import uuid4

from fastapi import Request

from producer.contract import ErrorCode, JobRequest, Usage
from producer.contract.keys import tenant_queue
from producer.enqueue import check_size, encode_call
from producer.errors import InvalidJobError, PromptmillError, RedisUnavailableError
from producer.gateway.auth import Caller
from producer.gateway.context import GatewayContext
from producer.gateway.errors import ApiError, invalid_request
from producer.gateway.item_references import give_items
from producer.gateway.job_records import JobRecord
from producer.gateway.rate_limits import estimate_tokens
from producer.gateway.stored_responses import continue_again, continue_response
from producer.idempotency import id_from_key
from producer.job import AsyncJob
from producer.openai.request import OpenAIRequest, parse_body
from producer.openai.response import response_id
from producer.openai.responses.body import ResponseFrame
from producer.openai.responses.items import read_references
from producer.openai.responses.request import RESPONSES_URL
from producer.operations import send
from producer.rq_names import job_key, queue_key
from producer.workers import max_request_bytes

DETACH_HEADER = "x-promptmill-detach"
JOB_ID_HEADER = "x-promptmill-job-id"
IDEMPOTENCY_HEADER = "idempotency-key"
MAX_IDEMPOTENCY_KEY_CHARS = 200
DEPTH_RETRY_AFTER_SECONDS = 5.0
MAX_GROWTH = 3  # times as many bytes in a job as in a body: é has two there, and six as \u00e9
MAX_OWN_BYTES = 2048  # what we add: names of the tenant and the key


@dataclass(frozen=True, slots=True)
class AcceptedRequest:
    """A request whose jobs are enqueued. `is_keyed`: the same request again finds the same jobs. `is_detached`: the
    jobs continue when the client disconnects or one of them fails."""

    asked: OpenAIRequest
    caller: Caller
    jobs: list[AsyncJob]
    records: list[JobRecord]
    is_keyed: bool
    is_detached: bool
    num_tokens_taken: int | None  # of the key's limit, estimated; None: the first such request took them

    @property
    def model(self) -> str:
        return self.records[0].model

    @property
    def created(self) -> int:
        return self.records[0].created

    @property
    def frame(self) -> ResponseFrame:
        """Of a response, which is one job."""
        return self.records[0].frame(self.jobs[0].id, self.asked.jobs[0])

    @property
    def headers(self) -> dict[str, str]:
        return {JOB_ID_HEADER: ",".join(job.id for job in self.jobs)}

    async def settle(self, context: GatewayContext, usage: Usage) -> None:
        """Correct the key's limit by what the request really used. Raises nothing: while Redis is away, the estimate
        stands."""
        if self.caller.key is not None and self.num_tokens_taken is not None:
            try:
                await context.limits.settle(self.caller.key, num_taken=self.num_tokens_taken, usage=usage)
            except PromptmillError:
                return  # the estimate stands


async def accept(context: GatewayContext, caller: Caller, request: Request, url: str) -> AcceptedRequest:
    """Check a request and enqueue its jobs. Raises ApiError or a PromptmillError; then nothing was enqueued, unless the
    error says that this is unknown."""
    key = idempotency_key(request)
    asked, num_bytes = await _read(context, caller, request, url, key)
    is_keyed = key is not None or asked.jobs[0].idempotency_key is not None
    # A request with a key is meant to be repeated: it must not be cancelled with its connection.
    is_detached = _detach_flag(request, default=is_keyed or asked.is_in_background)
    if asked.model is None:
        message = "model: is required; GET /v1/models lists what is served"
        raise invalid_request(message, "model")
    jobs = [_owned(job, caller, key, at) for at, job in enumerate(asked.jobs)]
    ids = [_job_id(job) for job in jobs]
    known = await _find_known(context, ids) if is_keyed else set()
    is_known = len(known) == len(ids)
    num_tokens = await _admit(context, caller, asked.model, jobs, num_bytes, is_known=is_known)
    asked_for = dict(zip(ids, _records(asked, caller, asked.model, ids), strict=True))
    records = await context.records.write(asked_for)
    if any((record.url, record.key_id) != (url, caller.key_id) for record in records):
        raise key_conflict()
    try:
        enqueued = await context.client.submit_many(jobs, job_ids=None if is_keyed else ids)
        is_ours = not is_keyed or is_known or await context.records.confirm(asked_for)
    except InvalidJobError as error:
        if error.code is not ErrorCode.IDEMPOTENCY_CONFLICT:
            raise
        raise key_conflict() from error
    except RedisUnavailableError as error:
        message = "the queue went away while the request was enqueued; it may or may not have been"
        raise ApiError(
            HTTPStatus.SERVICE_UNAVAILABLE,
            "queue_unavailable",
            message,
            should_retry=is_keyed,
            retry_after_seconds=2,
        ) from error
    if not is_ours:  # another request with this key came in between, and has the jobs
        raise key_conflict()
    return AcceptedRequest(asked, caller, enqueued, records, is_keyed, is_detached, num_tokens)


async def _read(
    context: GatewayContext, caller: Caller, request: Request, url: str, key: str | None
) -> tuple[OpenAIRequest, int]:
    """The parsed request and its size in bytes, with the earlier response that it continues."""
    if url != RESPONSES_URL:
        return await context.bodies.read(request, partial(parse_body, url)), len(await request.body())
    body, named = await context.bodies.read(request, lambda body: (body, read_references(body.get("input"))))
    num_bytes = len(await request.body())
    if named:
        body, num_bytes = await give_items(context, caller, body, named, num_bytes)
    asked = await context.bodies.run(num_bytes, parse_body, url, body)
    if asked.response is None or asked.response.previous_response_id is None:
        return asked, num_bytes
    job = _owned(asked.jobs[0], caller, key, 0)
    if job.idempotency_key is not None and (again := await continue_again(context, asked, _job_id(job))) is not None:
        return again, num_bytes
    asked, num_earlier = await continue_response(context, caller, asked, asked.response.previous_response_id)
    return asked, num_bytes + num_earlier


async def _find_known(context: GatewayContext, ids: list[str]) -> set[str]:
    """The ids of jobs that exist already."""
    found = await context.redis.run(send(*(("EXISTS", job_key(job_id)) for job_id in ids)))
    return {job_id for job_id, exists in zip(ids, found, strict=True) if exists}


async def _admit(
    context: GatewayContext, caller: Caller, model: str, jobs: list[JobRequest], num_bytes: int, *, is_known: bool
) -> int | None:
    """Returns the tokens taken from the key's limit; None if all jobs exist already. `num_bytes`: of the request's
    body. Raises ApiError: 400, 403, 404, 503, 429."""
    if not caller.may_use(model):
        message = f"model: the API key may not use {model!r}"
        raise ApiError(HTTPStatus.FORBIDDEN, "model_not_allowed", message, param="model")
    if not is_known:  # known jobs may have answers even while no worker is alive
        await _check_queue(context, tenant_queue(await context.catalog.find_queue(model), jobs[0].tenant))
        await _check_size(context, model, jobs, num_bytes)
    if caller.key is not None:
        num_tokens = await context.limits.take(caller.key, 0 if is_known else sum(map(estimate_tokens, jobs)))
    else:
        num_tokens = 0
    return None if is_known else num_tokens


async def _check_queue(context: GatewayContext, queue: str) -> None:
    [depth] = await context.redis.run(send(("LLEN", queue_key(queue))))
    if depth >= context.settings.max_queue_depth:
        raise ApiError(
            HTTPStatus.TOO_MANY_REQUESTS,
            "queue_full",
            f"{depth} requests are waiting already; nothing was enqueued, try again later",
            retry_after_seconds=DEPTH_RETRY_AFTER_SECONDS,
        )


async def _check_size(context: GatewayContext, model: str, jobs: list[JobRequest], num_bytes: int) -> None:
    """Refuse what every worker of the model would refuse for its size. `num_bytes`: of the body."""
    max_bytes = max_request_bytes(await context.catalog.workers(), model)
    if max_bytes is None or MAX_GROWTH * num_bytes + MAX_OWN_BYTES <= max_bytes:
        return
    if jobs[0].task == "embed":  # each input may fill the context; another rule limits their number
        return
    for job in jobs:
        check_size(job, len(await context.bodies.run(num_bytes, encode_call, job)), max_bytes)


def _owned(job: JobRequest, caller: Caller, key: str | None, at: int) -> JobRequest:
    """The job with its caller's tenant and, if there are several prompts, a key of its own. Raises ApiError."""
    tenant = job.tenant
    if caller.key is not None:
        if tenant not in (None, caller.key.tenant):
            message = f"tenant: the API key is not {tenant!r}'s; leave it out"
            raise ApiError(HTTPStatus.FORBIDDEN, "tenant_not_allowed", message, param="tenant")
        tenant = caller.key.tenant
    named = key if key is not None else job.idempotency_key
    if named is not None:
        named = ":".join([*([caller.key.id] if caller.key is not None else []), *([str(at)] if at else []), named])
        if len(named) > 256:
            message = "idempotency_key: is too long; give at most 200 characters"
            raise invalid_request(message, "idempotency_key")
    return job.model_copy(update={"tenant": tenant, "idempotency_key": named})


def _job_id(job: JobRequest) -> str:
    return uuid4().hex if job.idempotency_key is None else id_from_key(job.tenant, job.idempotency_key)


def _records(asked: OpenAIRequest, caller: Caller, model: str, job_ids: list[str]) -> list[JobRecord]:
    created, first_index, records = int(time.time()), 0, []
    for job in asked.jobs:
        records.append(
            JobRecord(
                key_id=caller.key_id,
                url=asked.url,
                response_id=response_id(asked.url, job_ids[0]),
                model=model,
                created=created,
                first_index=first_index,
                num_choices=job.n,
                callers_names=asked.callers_names,
                response=asked.response,
            )
        )
        first_index += len(job.to_embed) or job.n
    return records


def _detach_flag(request: Request, *, default: bool) -> bool:
    value = request.headers.get(DETACH_HEADER, str(default)).strip().lower()
    if value not in ("true", "false"):
        message = f"{DETACH_HEADER}: must be true or false; got {value[:60]!r}"
        raise invalid_request(message, DETACH_HEADER)
    return value == "true"


def key_conflict() -> ApiError:
    code = ErrorCode.IDEMPOTENCY_CONFLICT
    message = "idempotency_key: was used for another request; send the same one, or use a new key"
    return ApiError(code.http_status, code, message, param="idempotency_key", should_retry=False)


def idempotency_key(request: Request) -> str | None:
    """The header's value. Raises ApiError."""
    value = request.headers.get(IDEMPOTENCY_HEADER)
    if value is not None and not 0 < len(value) <= MAX_IDEMPOTENCY_KEY_CHARS:
        message = f"{IDEMPOTENCY_HEADER}: must have 1 to {MAX_IDEMPOTENCY_KEY_CHARS} characters; got {len(value)}"
        raise invalid_request(message, IDEMPOTENCY_HEADER)
    return value
