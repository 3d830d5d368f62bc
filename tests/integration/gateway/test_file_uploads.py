"""Uploads that are refused, break off or are too large: each says why, and none leaves anything behind."""

import shutil
import socket
from collections.abc import Iterator
from contextlib import closing
from http.client import HTTPResponse
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest
import redis

from producer.gateway.files import file_keys, uploads
from tests.fakes.file_stores import FolderOfFiles, PlaceOfFiles
from tests.fakes.gateways import RunningGateway, StartGateway, open_client
from tests.fakes.redis_reads import sorted_set_names
from tests.fakes.waiting import wait_until

LINES = b'{"custom_id": "1"}\n'
BATCH = ("purpose", b"batch")
FILE = ('file"; filename="a.jsonl', LINES)


def form(*fields: tuple[str, bytes]) -> bytes:
    parts = (b'--xyz\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n' % (n.encode(), v) for n, v in fields)
    return b"".join(parts) + b"--xyz--\r\n"


def post(gateway: RunningGateway, body: Any, content_type: str = "multipart/form-data; boundary=xyz") -> httpx.Response:
    headers = {"content-type": content_type}
    return httpx.post(f"{gateway.url}/v1/files", content=body, headers=headers, timeout=30)


def is_clean(place: PlaceOfFiles, redis_client: redis.Redis) -> bool:
    return not place.names() and not redis_client.exists(file_keys.index_key("*", None))


@pytest.fixture
def files_gateway(start_gateway: StartGateway, place: PlaceOfFiles) -> RunningGateway:
    return start_gateway(**place.settings)


@pytest.fixture
def folder(tmp_path: Path) -> FolderOfFiles:
    (tmp_path / "folder").mkdir()
    return FolderOfFiles(tmp_path / "folder")


class OpenUpload:
    """An upload of a megabyte and more that has not ended: the test says how it does."""

    def __init__(self, gateway: RunningGateway) -> None:
        self._socket = socket.create_connection(("127.0.0.1", gateway.port), timeout=30)
        body = form(BATCH, ('file"; filename="a.jsonl', b"x" * 3_000_000))
        self._rest = body[2_000_000:]
        head = "POST /v1/files HTTP/1.1\r\nhost: x\r\ncontent-type: multipart/form-data; boundary=xyz\r\n"
        self._socket.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body[:2_000_000])

    def finish(self) -> tuple[int, bytes]:
        self._socket.sendall(self._rest)
        return self.answer()

    def answer(self) -> tuple[int, bytes]:
        with closing(HTTPResponse(self._socket)) as response:
            response.begin()
            return response.status, response.read()

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def open_upload(files_gateway: RunningGateway, redis_client: redis.Redis) -> Iterator[OpenUpload]:
    with closing(OpenUpload(files_gateway)) as upload:
        wait_until(lambda: redis_client.zcard(file_keys.UNRECORDED_KEY) == 1)
        yield upload


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ([FILE], "purpose", "is needed"),
        ([FILE, ("purpose", b"assistants")], "purpose", "must be 'batch'; got 'assistants'"),
        ([("purpose", b"batch_output"), FILE], "purpose", "batches write those themselves"),
        ([BATCH], "file", "is needed"),
        ([BATCH, ("file", LINES)], "file", "a part with a filename"),
        ([BATCH, ('file"; filename="a', b"")], "file", "is empty"),
        ([BATCH, ('file"; filename="', LINES)], "file", "its filename must have"),
        ([BATCH, ('file"; filename="' + "a" * 300, LINES)], "file", "its filename must have"),
        ([BATCH, FILE, FILE], "file", "is given twice"),
        ([BATCH, BATCH, FILE], "purpose", "is given twice"),
        ([BATCH, ("model", b"x"), FILE], "model", "is not a field of an upload"),
        ([BATCH, ("purpose\xff", b"x"), FILE], None, ""),
        ([BATCH, FILE, ("expires_after[seconds]", b"3600")], "expires_after[anchor]", "is missing"),
        ([BATCH, FILE, ("expires_after[anchor]", b"created_at")], "expires_after[seconds]", "is missing"),
        ([BATCH, FILE, ("expires_after[anchor]", b"now")], "expires_after[anchor]", "must be 'created_at'"),
        *(
            ([BATCH, FILE, ("expires_after[seconds]", seconds)], "expires_after[seconds]", "from 3600 to 2592000")
            for seconds in (b"3599", b"2592001", b"1e4", b"-3600", b"9" * 5000)
        ),
        ([BATCH, ("purpose" * 20_000, b"x"), FILE], None, ""),
        ([FILE, ("expires_after[anchor]", b"x" * 3_000_000)], None, "without its file"),
    ],
)
def test_a_form_that_is_wrong_is_refused_by_the_name_of_its_field(
    start_gateway: StartGateway,
    folder: FolderOfFiles,
    redis_client: redis.Redis,
    fields: list[tuple[str, bytes]],
    param: str | None,
    words: str,
) -> None:
    answer = post(start_gateway(**folder.settings), form(*fields))
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["code"] == "invalid_request" and words in error["message"]
    if param is not None:
        assert error["param"] == param and error["message"].startswith(f"{param}: ")
    wait_until(lambda: is_clean(folder, redis_client))


def test_a_body_that_is_no_form_is_refused(
    start_gateway: StartGateway, folder: FolderOfFiles, redis_client: redis.Redis
) -> None:
    gateway = start_gateway(**folder.settings)
    for content_type in ("application/json", "multipart/form-data", ""):
        assert post(gateway, b"{}", content_type).json()["error"]["code"] == "unsupported_media_type"
    assert post(gateway, b"{}", f"multipart/form-data; boundary={'x' * 300}").status_code == 400
    whole = form(BATCH, FILE)
    for broken in (b"", b"nothing of the kind", whole[:60], whole[:-9], b"--xyz\r\n\x00: x\r\n\r\n"):
        answer = post(gateway, broken)
        assert answer.status_code == 400 and answer.json()["error"]["message"], broken
    wait_until(lambda: is_clean(folder, redis_client))


def test_the_fields_may_come_in_any_order_and_paths_are_no_names(files_gateway: RunningGateway) -> None:
    fields = [("expires_after[seconds]", b"7200"), ("expires_after[anchor]", b"created_at")]
    file = ('file"; filename="C:\\\\folder\\\\../a b.jsonl', LINES)
    kept = post(files_gateway, form(*fields, file, BATCH)).json()
    assert kept["filename"] == "a b.jsonl" and kept["expires_at"] == kept["created_at"] + 7200
    assert httpx.get(f"{files_gateway.url}/v1/files/{kept['id']}/content").content == LINES


def test_a_file_of_the_largest_size_is_taken_and_one_byte_more_is_not(
    start_gateway: StartGateway, place: PlaceOfFiles, redis_client: redis.Redis
) -> None:
    gateway = start_gateway(**place.settings, max_file_bytes=9_000_000, max_body_bytes=2048)
    with open_client(gateway) as client:
        kept = client.files.create(file=("a", b"x" * 9_000_000), purpose="batch")
        assert kept.bytes == 9_000_000, "the limit of other bodies is not the files'"
        client.files.delete(kept.id)
        with pytest.raises(openai.APIStatusError) as error:
            client.files.create(file=("a", b"x" * 9_000_001), purpose="batch")
        assert error.value.status_code == 413
        assert (error.value.code, error.value.param) == ("request_too_large", "file")
    wait_until(lambda: is_clean(place, redis_client))


def test_what_is_far_too_large_is_refused_before_it_comes_and_while_it_comes(
    start_gateway: StartGateway, place: PlaceOfFiles, redis_client: redis.Redis
) -> None:
    gateway = start_gateway(**place.settings, max_file_bytes=100_000)
    with open_client(gateway) as client:
        for _ in range(3):  # the whole body is written before the answer is read, and the answer is there
            with pytest.raises(openai.APIStatusError) as error:
                client.files.create(file=("a", b"x" * 30_000_000), purpose="batch")
            assert (error.value.status_code, error.value.code) == (413, "request_too_large")
            assert "--max-file-bytes" in error.value.message
    body = form(BATCH, ('file"; filename="a', b"x" * 30_000_000))
    chunked = post(gateway, (body[at : at + 50_000] for at in range(0, len(body), 50_000)))
    assert (chunked.status_code, chunked.json()["error"]["code"]) == (413, "request_too_large")
    wait_until(lambda: is_clean(place, redis_client))


def test_an_upload_that_breaks_off_leaves_nothing(
    open_upload: OpenUpload, place: PlaceOfFiles, redis_client: redis.Redis
) -> None:
    open_upload.close()
    wait_until(lambda: is_clean(place, redis_client))


def test_an_upload_that_was_taken_for_dead_is_not_recorded(
    open_upload: OpenUpload, place: PlaceOfFiles, redis_client: redis.Redis, start_gateway: StartGateway
) -> None:
    [part] = sorted_set_names(redis_client, file_keys.UNRECORDED_KEY)
    redis_client.zadd(file_keys.UNRECORDED_KEY, {part: 1})
    start_gateway(**place.settings)  # another replica cleans up
    wait_until(lambda: not redis_client.exists(file_keys.UNRECORDED_KEY))
    assert open_upload.finish()[0] == 503
    wait_until(lambda: is_clean(place, redis_client))


def test_an_upload_that_falls_silent_is_ended(
    start_gateway: StartGateway, folder: FolderOfFiles, redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "SILENCE_SECONDS", 0.2)
    with closing(OpenUpload(start_gateway(**folder.settings))) as upload:
        status, body = upload.answer()
    assert status == 408 and b"upload_stalled" in body
    wait_until(lambda: is_clean(folder, redis_client))


def test_so_many_uploads_at_a_time_and_no_more(
    files_gateway: RunningGateway, open_upload: OpenUpload, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "MAX_OPEN_UPLOADS", 1)
    with open_client(files_gateway) as client:
        with pytest.raises(openai.RateLimitError) as error:
            client.files.create(file=("a", LINES), purpose="batch")
        assert error.value.code == "too_many_uploads" and error.value.response.headers["retry-after"] == "5"
        assert open_upload.finish()[0] == 200
        assert client.files.create(file=("a", LINES), purpose="batch").bytes == len(LINES)


def test_a_store_that_fails_is_said_to_fail(
    start_gateway: StartGateway, folder: FolderOfFiles, redis_client: redis.Redis
) -> None:
    with open_client(start_gateway(**folder.settings)) as client:
        shutil.rmtree(folder.folder)
        with pytest.raises(openai.InternalServerError) as error:
            client.files.create(file=("a", LINES), purpose="batch")
        assert (error.value.status_code, error.value.code) == (503, "file_store_error")
        assert list(client.files.list()) == []


def test_gateways_that_keep_files_in_different_places_take_none(
    start_gateway: StartGateway, folder: FolderOfFiles, tmp_path: Path
) -> None:
    with open_client(start_gateway(**folder.settings)) as one:
        one.files.create(file=("a", LINES), purpose="batch")
    with open_client(start_gateway(files=str(tmp_path / "elsewhere"))) as other:
        refused = pytest.raises(openai.InternalServerError, match="give all gateways the same one")
        with refused:
            other.files.create(file=("a", LINES), purpose="batch")
