"""Uploads, from a request's first byte to the file's record: straight into the store, never whole in memory.

A part is reserved before its first byte, renewed while bytes come in, and belongs to a file once the record is made. An
upload that ends before that removes what it wrote; what a dead process leaves is removed by `housekeeping`.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from http import HTTPStatus
from uuid import uuid4

from fastapi import Request

from producer.errors import PromptmillError
from producer.gateway.errors import ApiError
from producer.gateway.files.base import FileStore, PartWriter
from producer.gateway.files.file_keys import created_at
from producer.gateway.files.file_records import RESERVED_SECONDS, FileRecord, FileRecords, Part
from producer.gateway.files.form import UploadForm
from producer.gateway.files.housekeeping import FileHousekeeping
from producer.gateway.files.threads import FileThreads
from producer.gateway.files.upload_fields import lifetime_seconds

MAX_OPEN_UPLOADS = 32  # of one process: each holds a piece of its file, 16 MiB at the most with S3
WRITE_BYTES = 1 << 20  # collected before a thread is asked to write them
SILENCE_SECONDS = 60.0  # an upload that sends nothing for so long is ended


class Uploads:
    def __init__(
        self,
        files: FileRecords,
        store: FileStore,
        threads: FileThreads,
        housekeeping: FileHousekeeping,
        *,
        max_file_bytes: int,
    ) -> None:
        self._files = files
        self._store = store
        self._threads = threads
        self._housekeeping = housekeeping
        self._max_file_bytes = max_file_bytes
        self._num_open = 0

    async def receive(self, request: Request, key_id: str | None) -> FileRecord:
        """Raises ApiError, ClientDisconnect or a PromptmillError; then there is no file."""
        if self._num_open >= MAX_OPEN_UPLOADS:
            message = f"{MAX_OPEN_UPLOADS} uploads are going on here; try again later, or at another replica"
            raise ApiError(HTTPStatus.TOO_MANY_REQUESTS, "too_many_uploads", message, retry_after_seconds=5)
        self._num_open += 1
        try:
            form = UploadForm(request.headers.get("content-type", ""))
            part = await self._write_part(request, form)
            return await self._record(form, part, key_id)
        finally:
            self._num_open -= 1

    async def _write_part(self, request: Request, form: UploadForm) -> Part:
        name = uuid4().hex
        async with self._reserved(name), self._written(name) as writer, aclosing(_body(request)) as body:
            pending = bytearray()
            async for data in body:
                pending += form.feed(data)
                if form.num_file_bytes > self._max_file_bytes:
                    raise too_large(self._max_file_bytes)
                if len(pending) >= WRITE_BYTES:
                    await self._threads.run(writer.write, bytes(pending))
                    pending.clear()
            form.end()
            lifetime_seconds(form.fields)  # whether nothing is missing
            await self._threads.run(writer.write, bytes(pending))
        return Part(name, writer.num_bytes)

    async def _record(self, form: UploadForm, part: Part, key_id: str | None) -> FileRecord:
        """Where Redis fails now, it is not known whether the file was recorded: its bytes stay until they are due."""
        assert form.filename is not None
        file_id = await self._files.new_id()
        record = FileRecord(
            id=file_id,
            filename=form.filename,
            purpose="batch",
            key_id=key_id,
            expires_at=created_at(file_id) + lifetime_seconds(form.fields),
            num_bytes=part.num_bytes,
        )
        if not await self._files.create(record, [part]):
            await self._files.discard(part.name)
            self._housekeeping.wake()
            message = "the upload stood still for too long and was given up; send it again"
            raise ApiError(HTTPStatus.SERVICE_UNAVAILABLE, "upload_given_up", message)
        return record

    @asynccontextmanager
    async def _written(self, name: str) -> AsyncIterator[PartWriter]:
        writer = await self._threads.run(self._store.writer, name)
        try:
            yield writer
        except BaseException as error:
            await self._threads.run(writer.__exit__, type(error), error, error.__traceback__)
            raise
        await self._threads.run(writer.__exit__, None, None, None)

    @asynccontextmanager
    async def _reserved(self, name: str) -> AsyncIterator[None]:
        await self._files.reserve(name)
        renewing = asyncio.create_task(self._renew(name))
        try:
            yield
        finally:
            renewing.cancel()

    async def _renew(self, name: str) -> None:
        while True:
            await asyncio.sleep(RESERVED_SECONDS / 4)
            try:
                await self._files.renew(name)
            except PromptmillError:
                continue  # whether the part is still ours is decided when it is recorded


async def _body(request: Request) -> AsyncGenerator[bytes, None]:
    """Raises ClientDisconnect where the client goes away, ApiError (408) where it falls silent."""
    chunks = aiter(request.stream())
    while True:
        try:
            async with asyncio.timeout(SILENCE_SECONDS):
                data = await anext(chunks, None)
        except TimeoutError as error:
            message = f"the upload was silent for {SILENCE_SECONDS:g} s; send the file again"
            raise ApiError(HTTPStatus.REQUEST_TIMEOUT, "upload_stalled", message) from error
        if data is None:
            return
        yield data


def too_large(max_bytes: int) -> ApiError:
    message = f"file: is larger than {max_bytes} bytes; send less, or raise --max-file-bytes"
    return ApiError(
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        "request_too_large",
        message,
        param="file",
        headers={"connection": "close"},
    )
