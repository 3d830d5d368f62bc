"""From a request's body to jobs on the queue: checked, admitted, recorded, enqueued, in this order.

Whatever is refused is refused before anything is enqueued.
"""

import time
from dataclasses import dataclass
from http import HTTPStatus
from uuid import uuid4

from fastapi import Request

from producer.contract import ErrorCode
from producer.errors import RedisUnavailableError
from producer.gateway.bodies import read_json_object
from producer.gateway.context import GatewayContext
from producer.gateway.errors import ApiError
from producer.gateway.job_records import JobRecord
from producer.job import AsyncJob
from producer.openai_request import OpenAIRequest, parse_body
from producer.openai_response import response_id

DETACH_HEADER = "x-promptmill-detach"
JOB_ID_HEADER = "x-promptmill-job-id"


@dataclass(frozen=True, slots=True)
class AcceptedRequest:
    """A request whose jobs are enqueued. `is_detached`: they go on when the client goes away."""

    asked: OpenAIRequest
    jobs: list[AsyncJob]
    records: list[JobRecord]
    is_detached: bool

    @property
    def model(self) -> str:
        return self.records[0].model

    @property
    def created(self) -> int:
        return self.records[0].created

    @property
    def headers(self) -> dict[str, str]:
        return {JOB_ID_HEADER: ",".join(job.id for job in self.jobs)}


async def accept(context: GatewayContext, request: Request, url: str) -> AcceptedRequest:
    """Raises ApiError or a PromptmillError; then nothing was enqueued, unless the error says that it is not known."""
    is_detached = _detach_flag(request)
    asked = parse_body(url, await read_json_object(request))
    if asked.model is None:
        message = "model: is required; GET /v1/models lists what is served"
        raise ApiError(HTTPStatus.BAD_REQUEST, ErrorCode.INVALID_REQUEST, message, param="model")
    await context.catalog.find_queue(asked.model)
    job_ids = [uuid4().hex for _ in asked.jobs]
    records = _records(asked, asked.model, job_ids)
    await context.records.write(dict(zip(job_ids, records, strict=True)))
    try:
        jobs = await context.client.submit_many(asked.jobs, job_ids=job_ids)
    except RedisUnavailableError as error:
        message = "the queue went away while the request was enqueued; it may or may not have been"
        raise ApiError(
            HTTPStatus.SERVICE_UNAVAILABLE, "queue_unavailable", message, should_retry=False, retry_after_seconds=2
        ) from error
    return AcceptedRequest(asked, jobs, records, is_detached)


def _records(asked: OpenAIRequest, model: str, job_ids: list[str]) -> list[JobRecord]:
    created, first_index, records = int(time.time()), 0, []
    for job in asked.jobs:
        records.append(
            JobRecord(
                key_id=None,
                url=asked.url,
                response_id=response_id(asked.url, job_ids[0]),
                model=model,
                created=created,
                first_index=first_index,
                num_choices=job.n,
            )
        )
        first_index += job.n
    return records


def _detach_flag(request: Request) -> bool:
    value = request.headers.get(DETACH_HEADER, "false").strip().lower()
    if value not in ("true", "false"):
        message = f"{DETACH_HEADER}: must be true or false; got {value[:60]!r}"
        raise ApiError(HTTPStatus.BAD_REQUEST, ErrorCode.INVALID_REQUEST, message, param=DETACH_HEADER)
    return value == "true"
