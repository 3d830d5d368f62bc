"""Files' bytes in a bucket, against a server of its protocol: whole or not there, and read on where a stream broke."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from socketserver import StreamRequestHandler, TCPServer
from typing import Any
from uuid import uuid4

import boto3
import pytest
from botocore.exceptions import ClientError, ReadTimeoutError, ResponseStreamingError

from producer.errors import FileStoreError, ResultStoreError, SettingsError
from producer.gateway.files import s3
from producer.gateway.files.s3 import UPLOAD_BYTES, S3FileStore
from producer.gateway.files.select import select_file_store
from producer.stored_results import read_object
from tests.fakes.file_stores import BucketOfFiles
from tests.fakes.ports import free_port

DATA = bytes(range(251)) * (2 * UPLOAD_BYTES // 251 + 1000)  # three pieces, the last a small one


@pytest.fixture
def bucket(s3_endpoint: str) -> BucketOfFiles:
    return BucketOfFiles(s3_endpoint, uuid4().hex)


@pytest.fixture
def store(bucket: BucketOfFiles) -> S3FileStore:
    store = select_file_store(bucket.settings["files"], s3_endpoint_url=bucket.endpoint)
    store.check()
    assert isinstance(store, S3FileStore)
    return store


KILLED_CHECK = """
import os, signal, sys
from producer.gateway.files.select import select_file_store
from producer.stored_results import read_object
store = select_file_store(sys.argv[1], s3_endpoint_url=sys.argv[2])
store._client.meta.events.register(f"before-call.s3.{sys.argv[3]}", lambda **_: os.kill(os.getpid(), signal.SIGKILL))
store.check()
"""


@pytest.mark.parametrize("call", ["PutObject", "GetObject", "AbortMultipartUpload", "DeleteObject"])
def test_what_a_check_that_is_killed_leaves_is_gone_with_the_next(bucket: BucketOfFiles, call: str) -> None:
    where = bucket.settings["files"]
    killed = subprocess.run([sys.executable, "-c", KILLED_CHECK, where, bucket.endpoint, call])
    assert killed.returncode == -9 and len(everything(bucket)) >= 1
    for _ in range(2):
        select_file_store(where, s3_endpoint_url=bucket.endpoint).check()
        assert everything(bucket) == []


def everything(bucket: BucketOfFiles) -> list[str]:
    """The names of objects and unfinished uploads, hidden ones as well."""
    client = boto3.client("s3", endpoint_url=bucket.endpoint)
    objects = client.list_objects_v2(Bucket="results", Prefix=bucket.prefix).get("Contents", [])
    uploads = client.list_multipart_uploads(Bucket="results", Prefix=bucket.prefix).get("Uploads", [])
    return [entry["Key"] for entry in objects] + [entry["Key"] for entry in uploads]


@pytest.mark.parametrize(("num_deleted", "is_refused"), [(4, False), (5, True)])
def test_gateways_that_start_together_do_not_refuse_each_others_bucket(
    store: S3FileStore, monkeypatch: pytest.MonkeyPatch, num_deleted: int, is_refused: bool
) -> None:
    read, left = store._client.get_object, iter(range(num_deleted))

    def read_late(**arguments: Any) -> Any:
        if next(left, None) is not None:
            store._client.delete_object(**arguments)
        return read(**arguments)

    monkeypatch.setattr(store._client, "get_object", read_late)
    with pytest.raises(SettingsError) if is_refused else nullcontext():
        store.check()


def fail_once(monkeypatch: pytest.MonkeyPatch, store: S3FileStore, name: str, *, after: bool) -> None:
    """The reply to the next call of this name is lost; `after`: what was asked for has been done."""
    call = getattr(store._client, name)

    def lost(**arguments: Any) -> None:
        monkeypatch.setattr(store._client, name, call)
        if after:
            call(**arguments)
        raise ReadTimeoutError(endpoint_url="s3")

    monkeypatch.setattr(store._client, name, lost)


@pytest.mark.parametrize("size", [0, 1, UPLOAD_BYTES, UPLOAD_BYTES + 1, len(DATA)])
def test_a_part_of_any_size_is_there_once_it_is_committed(store: S3FileStore, bucket: BucketOfFiles, size: int) -> None:
    data = DATA[:size]
    with store.writer("part") as writer:
        for start in range(0, size, 3_000_001):
            writer.write(data[start : start + 3_000_001])
        with pytest.raises(FileStoreError):
            next(store.read("part"))
    assert writer.num_bytes == size and bucket.names() == {"part"}
    assert b"".join(store.read("part")) == data
    for offset in {0, size // 2, size}:
        assert b"".join(store.read("part", offset)) == data[offset:]


@pytest.mark.parametrize("size", [3, len(DATA)])
def test_a_writer_that_fails_leaves_nothing(store: S3FileStore, bucket: BucketOfFiles, size: int) -> None:
    with pytest.raises(KeyError), store.writer("part") as writer:
        writer.write(DATA[:size])
        raise KeyError
    assert not bucket.names()


def test_what_was_deleted_under_a_living_writer_is_not_committed(store: S3FileStore, bucket: BucketOfFiles) -> None:
    with pytest.raises(FileStoreError, match="part cannot be written"), store.writer("part") as writer:
        writer.write(DATA)
        store.delete("part")
    assert not bucket.names()


def test_deleting_takes_what_there_is_and_may_be_repeated(store: S3FileStore, bucket: BucketOfFiles) -> None:
    for name in ("begun", "begun-too"):
        store.writer(name).write(DATA)  # as one leaves it that was killed
    for part in ("begun", "begun", "never"):
        store.delete(part)
    assert bucket.names() == {"begun-too"}, "a name that begins alike is another part's"


@pytest.mark.parametrize("name", ["put_object", "complete_multipart_upload"])
@pytest.mark.parametrize("is_done", [True, False])
def test_a_commit_whose_reply_is_lost_counts_if_it_was_done(
    store: S3FileStore, bucket: BucketOfFiles, monkeypatch: pytest.MonkeyPatch, name: str, is_done: bool
) -> None:
    data = DATA if name.startswith("complete") else DATA[:100]
    fail_once(monkeypatch, store, name, after=is_done)
    if is_done:
        with store.writer("part") as writer:
            writer.write(data)
        assert b"".join(store.read("part")) == data
    else:
        with pytest.raises(FileStoreError), store.writer("part") as writer:
            writer.write(data)
        assert not bucket.names()


def test_a_stream_that_breaks_off_goes_on_where_it_broke(store: S3FileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "READ_RETRY_SECONDS", (0.0,))
    with store.writer("part") as writer:
        writer.write(DATA)
    stream, num_breaks = store._stream, 0

    def breaking(key: str, offset: int) -> Iterator[bytes]:
        nonlocal num_breaks
        for number, chunk in enumerate(stream(key, offset)):
            if number == 3 and num_breaks < 5:
                num_breaks += 1
                raise ResponseStreamingError(error="reset")
            yield chunk

    monkeypatch.setattr(store, "_stream", breaking)
    assert b"".join(store.read("part")) == DATA and num_breaks == 5
    num_breaks = -1_000_000  # for ever, from the fourth chunk on
    monkeypatch.setattr(s3, "READ_RETRY_SECONDS", ())
    chunks = store.read("part")
    assert sum(len(next(chunks)) for _ in range(3)) < len(DATA)
    with pytest.raises(FileStoreError, match="part part cannot be read"):
        next(chunks)


@pytest.mark.usefixtures("s3_endpoint")  # it sets the credentials
def test_a_reply_that_ends_within_its_headers_is_no_empty_object(monkeypatch: pytest.MonkeyPatch) -> None:
    replies = [b"HTTP/1.1 200 OK\r\nContent-Ty", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nbytes"]

    class NextReply(StreamRequestHandler):
        def handle(self) -> None:
            while self.rfile.readline().strip():
                pass
            self.wfile.write(replies.pop(0))

    monkeypatch.setattr(s3, "READ_RETRY_SECONDS", (0.0,))
    with TCPServer(("127.0.0.1", 0), NextReply) as server:
        endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            assert b"".join(S3FileStore("results", "", endpoint_url=endpoint).read("part")) == b"bytes"
            replies.append(b"HTTP/1.1 200 OK\r\n")
            with pytest.raises(ResultStoreError, match="cannot be read"):
                read_object("s3://results/object", endpoint)
        finally:
            server.shutdown()
            thread.join()
    assert not replies


def test_a_bucket_that_cannot_be_used_is_refused_with_the_remedy(
    s3_endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SettingsError, match=r"--files \(PROMPTMILL_FILES\): bucket 'nowhere' .* does not exist"):
        select_file_store("s3://nowhere/x", s3_endpoint_url=s3_endpoint).check()
    monkeypatch.setattr("producer.s3_connection.MAX_ATTEMPTS", 1)
    with pytest.raises(SettingsError, match=r"cannot reach bucket 'results'.*--s3-endpoint-url"):
        select_file_store("s3://results", s3_endpoint_url=f"http://127.0.0.1:{free_port()}").check()
    store = select_file_store("s3://results", s3_endpoint_url=s3_endpoint)
    assert isinstance(store, S3FileStore)
    denied = ClientError({"Error": {"Code": "AccessDenied"}}, "CreateMultipartUpload")
    monkeypatch.setattr(store._client, "create_multipart_upload", lambda **_: (_ for _ in ()).throw(denied))
    with pytest.raises(SettingsError, match=r"grant s3:PutObject, .* s3:ListBucketMultipartUploads"):
        store.check()
    for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(variable)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)
    with pytest.raises(SettingsError, match="no credentials for bucket 'results'"):
        select_file_store("s3://results", s3_endpoint_url=s3_endpoint).check()
