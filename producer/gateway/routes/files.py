"""/v1/files: what batches read and write, uploaded, listed, read back and deleted."""

import re
from collections.abc import AsyncGenerator
from contextlib import aclosing
from http import HTTPStatus
from typing import Annotated, Any, Literal
from urllib.parse import quote

from fastapi import APIRouter, Query, Request, Response
from starlette.responses import StreamingResponse

from producer.gateway.auth import Authenticated, Caller
from producer.gateway.context import Context, GatewayContext
from producer.gateway.errors import ApiError
from producer.gateway.files.file_keys import EVERYBODYS, ID_PATTERN, NOBODYS
from producer.gateway.files.file_records import FileRecord, Part
from producer.gateway.files.upload_fields import UPLOAD_SCHEMA
from producer.gateway.routes.list_body import list_body

FILES_URL = "/v1/files"
MAX_PAGE = 10_000

router = APIRouter(tags=["files"])


@router.post(
    FILES_URL,
    openapi_extra={"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": UPLOAD_SCHEMA}}}},
)
async def upload_file(context: Context, caller: Authenticated, request: Request) -> dict[str, Any]:
    """Keep a file of requests for a batch."""
    if caller.key is not None:
        await context.limits.take(caller.key, 0)
    return _body(await context.uploads.receive(request, caller.key_id))


@router.get(FILES_URL)
async def list_files(
    context: Context,
    caller: Authenticated,
    after: Annotated[str | None, Query(pattern=f"^{ID_PATTERN}$")] = None,
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = MAX_PAGE,
    order: Literal["asc", "desc"] = "desc",
    purpose: Annotated[str | None, Query(max_length=64)] = None,
) -> dict[str, Any]:
    """The key's own files, the newest first; an operator's key sees everybody's."""
    whose = EVERYBODYS if caller.is_operator else caller.key_id or NOBODYS
    page = await context.files.page(whose=whose, purpose=purpose, after=after, limit=limit, is_ascending=order == "asc")
    return list_body([_body(record) for record in page.records], has_more=page.has_more)


@router.get(FILES_URL + "/{file_id}")
async def get_file(context: Context, caller: Authenticated, file_id: str) -> dict[str, Any]:
    """What is known of a file."""
    return _body(await find_file(context, caller, file_id))


@router.delete(FILES_URL + "/{file_id}")
async def delete_file(context: Context, caller: Authenticated, file_id: str) -> dict[str, Any]:
    """Delete a file for good. One that a running batch needs is refused."""
    await find_file(context, caller, file_id)
    if await context.files.delete(file_id) == "held":
        message = f"file {file_id} is in use by a batch that has not ended; cancel the batch first"
        raise ApiError(HTTPStatus.CONFLICT, "file_in_use", message, should_retry=False)
    context.file_housekeeping.wake()
    return {"id": file_id, "object": "file", "deleted": True}


@router.get(
    FILES_URL + "/{file_id}/content",
    response_class=Response,
    responses={200: {"content": {"application/octet-stream": {}}}},
)
async def read_file(context: Context, caller: Authenticated, file_id: str) -> Response:
    """A file's bytes; of a file that a running batch still writes, those that there are."""
    record = await find_file(context, caller, file_id)
    parts = await context.files.parts(file_id)
    if record.num_bytes > 0 and not parts:
        raise file_not_found(file_id)  # deleted in between
    chunks = _read(context, parts)
    first = await anext(chunks, b"")  # before the headers: bytes that cannot be read are an error, not a torn response
    headers = {
        "content-length": str(sum(part.num_bytes for part in parts)),
        "content-disposition": f"attachment; filename*=UTF-8''{quote(record.filename, safe='')}",
        "x-content-type-options": "nosniff",  # a stranger's bytes come from the console's own origin
    }
    return StreamingResponse(_joined(first, chunks), media_type="application/octet-stream", headers=headers)


async def find_file(context: GatewayContext, caller: Caller, file_id: str) -> FileRecord:
    """Raises ApiError (404), also for a file of somebody else."""
    record = await context.files.get(file_id) if re.fullmatch(ID_PATTERN, file_id) else None
    if record is None or not caller.may_see(record.key_id):
        raise file_not_found(file_id)
    return record


def file_not_found(file_id: str) -> ApiError:
    message = f"there is no file {file_id[:100]!r}; it may have expired or been deleted"
    return ApiError(HTTPStatus.NOT_FOUND, "file_not_found", message, param="file_id")


async def _read(context: GatewayContext, parts: list[Part]) -> AsyncGenerator[bytes, None]:
    for part in parts:
        async with aclosing(context.file_threads.iterate(context.file_store.read(part.name))) as chunks:
            async for chunk in chunks:
                yield chunk


async def _joined(first: bytes, rest: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    async with aclosing(rest):
        yield first
        async for chunk in rest:
            yield chunk


def _body(record: FileRecord) -> dict[str, Any]:
    body = {
        "id": record.id,
        "object": "file",
        "bytes": record.num_bytes,
        "created_at": record.created_at,
        "filename": record.filename,
        "purpose": record.purpose,
        "status": record.status,
    }
    return body if record.expires_at is None else {**body, "expires_at": record.expires_at}
