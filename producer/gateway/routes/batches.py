"""/v1/batches: files of requests that are answered within a day, behind everybody who waits for an answer."""

import re
from http import HTTPStatus
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Request

from producer.errors import RedisUnavailableError
from producer.gateway.acceptance import idempotency_key, key_conflict
from producer.gateway.auth import Authenticated, Caller
from producer.gateway.batches.batch_keys import ID_PATTERN
from producer.gateway.batches.batch_record import BatchRecord, BatchStatus
from producer.gateway.batches.batch_records import KeyConflictError
from producer.gateway.batches.batch_request import BatchRequest, batch_request_body
from producer.gateway.context import Context, GatewayContext
from producer.gateway.errors import ApiError, invalid_request
from producer.gateway.files.file_keys import EVERYBODYS, NOBODYS
from producer.gateway.files.file_keys import ID_PATTERN as FILE_ID_PATTERN
from producer.gateway.routes.list_body import list_body

router = APIRouter(tags=["batches"])

BatchId = Annotated[str, Path(max_length=64)]
MAX_LIMIT = 100


@router.post("/v1/batches", openapi_extra=batch_request_body())
async def create_batch(context: Context, caller: Authenticated, request: Request) -> dict[str, Any]:
    """A batch of the requests in a file that was uploaded; it is validated, and run, in the background. Asked for again
    under the same `Idempotency-Key`, it is the same batch."""
    key = idempotency_key(request)
    asked = await context.bodies.read(request, BatchRequest.parse)
    await _check_input(context, caller, asked.input_file_id)
    if caller.key is not None:
        await context.limits.take(caller.key, 0)
    expiry = asked.output_expires_after
    try:
        record = await context.batches.create(
            key_id=caller.key_id,
            idempotency_key=key,
            tenant=caller.key.tenant if caller.key is not None else None,
            endpoint=asked.endpoint,
            input_file_id=asked.input_file_id,
            metadata=asked.metadata,
            output_expires_after=expiry.seconds if expiry is not None else None,
        )
    except KeyConflictError as error:
        raise key_conflict() from error
    except RedisUnavailableError as error:
        message = "the queue went away while the batch was made; it may or may not have been: see GET /v1/batches"
        status = HTTPStatus.SERVICE_UNAVAILABLE
        raise ApiError(status, "queue_unavailable", message, should_retry=key is not None) from error
    if record is None:  # deleted, or expired, since it was looked at
        raise _no_file(asked.input_file_id)
    context.carriers.wake()
    return record.to_body()


@router.get("/v1/batches")
async def list_batches(
    context: Context,
    caller: Authenticated,
    after: Annotated[str | None, Query(pattern=f"^{ID_PATTERN}$")] = None,
    limit: Annotated[int, Query(ge=1, le=MAX_LIMIT)] = 20,
) -> dict[str, Any]:
    """The key's batches, the newest first; an operator's key sees everybody's. `after`: the last id of a page."""
    whose = EVERYBODYS if caller.is_operator else caller.key_id or NOBODYS
    page = await context.batches.page(whose=whose, after=after, limit=limit)
    return list_body([record.to_body() for record in page.records], has_more=page.has_more)


@router.get("/v1/batches/{batch_id}")
async def get_batch(context: Context, caller: Authenticated, batch_id: BatchId) -> dict[str, Any]:
    """Where a batch stands. Its output and error file can be read while it runs, once it has them."""
    return (await _find(context, caller, batch_id)).to_body()


@router.post("/v1/batches/{batch_id}/cancel")
async def cancel_batch(context: Context, caller: Authenticated, batch_id: BatchId) -> dict[str, Any]:
    """End a batch: what is answered stays, each other line gets an error. Asked twice, it is the same."""
    await _find(context, caller, batch_id)
    status = await context.batches.cancel(batch_id)
    if status not in (BatchStatus.CANCELLING, BatchStatus.CANCELLED):
        message = f"batch {batch_id} is {status} and cannot be cancelled any more"
        raise ApiError(HTTPStatus.CONFLICT, "batch_not_cancellable", message, should_retry=False)
    return (await _find(context, caller, batch_id)).to_body()


async def _find(context: GatewayContext, caller: Caller, batch_id: str) -> BatchRecord:
    """Raises ApiError (404), also for a batch of somebody else."""
    record = await context.batches.get(batch_id) if re.fullmatch(ID_PATTERN, batch_id) else None
    if record is None or not caller.may_see(record.key_id):
        message = f"there is no batch {batch_id}; batches are kept for 30 days after their end"
        raise ApiError(HTTPStatus.NOT_FOUND, "batch_not_found", message, param="batch_id")
    return record


async def _check_input(context: GatewayContext, caller: Caller, file_id: str) -> None:
    """Raises ApiError: 404 for a file that is not there, or somebody else's; 400 for one that is no input."""
    record = await context.files.get(file_id) if re.fullmatch(FILE_ID_PATTERN, file_id) else None
    if record is None or not caller.may_see(record.key_id):
        raise _no_file(file_id)
    if record.purpose != "batch":
        message = f"input_file_id: the file's purpose must be 'batch'; it is {record.purpose!r}"
        raise invalid_request(message, "input_file_id")


def _no_file(file_id: str) -> ApiError:
    message = f"input_file_id: there is no file {file_id[:64]}; POST /v1/files with purpose=batch uploads one"
    return ApiError(HTTPStatus.NOT_FOUND, "file_not_found", message, param="input_file_id")
