"""Files' bytes in an S3 bucket: a part is an object, written by a multipart upload where it is large."""

import logging
import time
from collections.abc import Iterator
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Self

from botocore.exceptions import BotoCoreError, ClientError

from producer.errors import FileStoreError, SettingsError
from producer.gateway.files.base import READ_CHUNK_BYTES, check_part_name
from producer.s3_connection import S3_ERRORS, connect, describe, error_code, explain

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import CompletedPartTypeDef

UPLOAD_BYTES = 8 << 20  # of one piece of a multipart upload: what a writer holds. S3 takes 5 MiB or more, 10,000 pieces
READ_RETRY_SECONDS = (0.2, 0.5, 1.0, 2.0)  # after a stream that broke off; it goes on where it broke
PROBE_NAME = ".promptmill-check"  # one name, so that the next check removes what is left of one that was killed
PROBE_ATTEMPTS = 5  # gateways that start together delete each other's
RIGHTS = "s3:PutObject, s3:GetObject, s3:DeleteObject, s3:AbortMultipartUpload and s3:ListBucketMultipartUploads"

_log = logging.getLogger(__name__)


class S3FileStore:
    """A `FileStore`. Everybody who names the same bucket and prefix is taken to see the same parts."""

    def __init__(self, bucket: str, prefix: str, *, endpoint_url: str | None = None) -> None:
        """Raises SettingsError."""
        self._bucket = bucket
        self._prefix = f"{prefix}/" if prefix else ""
        self._bucket_words = describe(bucket, endpoint_url)
        self.where = self.identity = f"s3://{bucket}/{self._prefix}"
        try:
            self._client = connect(endpoint_url)
        except (BotoCoreError, ValueError) as error:
            raise SettingsError(f"--files (PROMPTMILL_FILES): no client for {self._bucket_words}: {error}") from error

    def check(self) -> None:
        """Tries everything that is done later, so that a missing right is known before the first file."""
        probe = f"{self._prefix}{PROBE_NAME}"
        try:
            upload = self._client.create_multipart_upload(Bucket=self._bucket, Key=probe)
            self._write_and_read(probe)
            self._abort(probe)
            with suppress(self._client.exceptions.NoSuchUpload):
                self._client.abort_multipart_upload(Bucket=self._bucket, Key=probe, UploadId=upload["UploadId"])
            self._client.delete_object(Bucket=self._bucket, Key=probe)
        except S3_ERRORS as error:
            words = explain(error, self._bucket_words, flag="--files", rights=RIGHTS)
            raise SettingsError(f"--files (PROMPTMILL_FILES): {words}") from error

    def _write_and_read(self, key: str) -> None:
        for attempt in range(1, PROBE_ATTEMPTS + 1):
            self._client.put_object(Bucket=self._bucket, Key=key, Body=b"")
            try:
                return self._client.get_object(Bucket=self._bucket, Key=key)["Body"].close()
            except ClientError:  # without the right to list, what is not there is denied
                if attempt == PROBE_ATTEMPTS:
                    raise

    def writer(self, part: str) -> "S3PartWriter":
        return S3PartWriter(self._client, self._bucket, self._key(part))

    def read(self, part: str, offset: int = 0) -> Iterator[bytes]:
        waits = iter(READ_RETRY_SECONDS)
        while True:
            try:
                for chunk in self._stream(self._key(part), offset):
                    offset += len(chunk)
                    waits = iter(READ_RETRY_SECONDS)
                    yield chunk
                return
            except S3_ERRORS as error:
                # boto3 has tried the request several times itself; it does not resume a stream that broke off.
                wait = next(waits, None)
                if wait is None or isinstance(error, ClientError):
                    raise FileStoreError(f"part {part} cannot be read from {self.where}: {error}") from error
                _log.warning("action=file_read_resumed part=%s offset=%d error=%s", part, offset, error)
                time.sleep(wait)

    def delete(self, part: str) -> None:
        key = self._key(part)
        try:
            self._abort(key)  # first: a writer that still lives can then complete nothing behind our back
            self._client.delete_object(Bucket=self._bucket, Key=key)
        except S3_ERRORS as error:
            raise FileStoreError(f"part {part} cannot be deleted from {self.where}: {error}") from error

    def _stream(self, key: str, offset: int) -> Iterator[bytes]:
        if offset == 0:
            body = self._client.get_object(Bucket=self._bucket, Key=key)["Body"]
        else:
            try:
                body = self._client.get_object(Bucket=self._bucket, Key=key, Range=f"bytes={offset}-")["Body"]
            except ClientError as error:
                if error_code(error) == "InvalidRange":  # the part ends there
                    return
                raise
        with body:
            yield from body.iter_chunks(READ_CHUNK_BYTES)

    def _abort(self, key: str) -> None:
        """Every upload of the key that was begun and not completed."""
        begun = self._client.get_paginator("list_multipart_uploads").paginate(Bucket=self._bucket, Prefix=key)
        for page in begun:
            for upload in page.get("Uploads", []):
                if upload["Key"] == key:
                    with suppress(self._client.exceptions.NoSuchUpload):
                        self._client.abort_multipart_upload(Bucket=self._bucket, Key=key, UploadId=upload["UploadId"])

    def _key(self, part: str) -> str:
        check_part_name(part)
        return f"{self._prefix}{part}"


class S3PartWriter:
    """A `PartWriter`. Holds UPLOAD_BYTES at most, and as much again while they are sent."""

    def __init__(self, client: "S3Client", bucket: str, key: str) -> None:
        self._client = client
        self._bucket = bucket
        self._key = key
        self._buffer = bytearray()
        self._upload_id: str | None = None
        self._etags: list[str] = []
        self.num_bytes = 0

    def __enter__(self) -> Self:
        return self

    def write(self, data: bytes) -> None:
        self.num_bytes += len(data)
        view = memoryview(data)
        while view:
            taken = UPLOAD_BYTES - len(self._buffer)
            self._buffer += view[:taken]
            view = view[taken:]
            if len(self._buffer) == UPLOAD_BYTES:
                try:
                    self._send_piece()
                except S3_ERRORS as error:
                    raise self._failure(error) from error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None:
            self._abort()
            return
        try:
            self._complete()
        except S3_ERRORS as failure:
            if not self._is_complete():
                self._abort()
                raise self._failure(failure) from failure

    def _send_piece(self) -> None:
        if self._upload_id is None:
            upload = self._client.create_multipart_upload(Bucket=self._bucket, Key=self._key)
            self._upload_id = upload["UploadId"]
        body, self._buffer = bytes(self._buffer), bytearray()
        sent = self._client.upload_part(
            Bucket=self._bucket,
            Key=self._key,
            UploadId=self._upload_id,
            PartNumber=len(self._etags) + 1,
            Body=body,
        )
        self._etags.append(sent["ETag"])

    def _complete(self) -> None:
        if self._upload_id is None:
            self._client.put_object(Bucket=self._bucket, Key=self._key, Body=bytes(self._buffer))
            return
        if self._buffer:
            self._send_piece()
        pieces: list[CompletedPartTypeDef] = [
            {"PartNumber": number, "ETag": etag} for number, etag in enumerate(self._etags, start=1)
        ]
        self._client.complete_multipart_upload(
            Bucket=self._bucket, Key=self._key, UploadId=self._upload_id, MultipartUpload={"Parts": pieces}
        )

    def _is_complete(self) -> bool:
        """Whether the call that failed was carried out all the same, as when only its reply was lost."""
        try:
            head = self._client.head_object(Bucket=self._bucket, Key=self._key)
        except S3_ERRORS:
            return False
        return head["ContentLength"] == self.num_bytes

    def _abort(self) -> None:
        """What cannot be removed now is removed when the part is due."""
        try:
            if self._upload_id is not None:
                self._client.abort_multipart_upload(Bucket=self._bucket, Key=self._key, UploadId=self._upload_id)
            self._client.delete_object(Bucket=self._bucket, Key=self._key)
        except S3_ERRORS as error:
            _log.warning("action=file_abort_failed key=%s error=%s", self._key, error)

    def _failure(self, error: Exception) -> FileStoreError:
        return FileStoreError(f"{self._key} cannot be written to bucket {self._bucket!r}: {error}")
