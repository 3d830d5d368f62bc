"""/v1/files with the official client, in a folder and in a bucket: what goes in comes out, and is listed, and goes."""

import asyncio
import random

import httpx2 as httpx
import openai
import pytest
import redis

from producer.async_transport import AsyncTransport
from producer.gateway.files import file_keys
from producer.gateway.files.file_records import FileRecord, FileRecords, Part
from producer.gateway.files.select import select_file_store
from tests.fakes.file_stores import PlaceOfFiles
from tests.fakes.gateways import RunningGateway, StartGateway, open_client
from tests.fakes.waiting import wait_until

LINES = b'{"custom_id": "1"}\n{"custom_id": "2"}\n'
LARGE = random.Random(0).randbytes(20_000_003)  # three pieces of a multipart upload


def upload(client: openai.OpenAI, content: bytes = LINES, name: str = "a.jsonl") -> openai.types.FileObject:
    return client.files.create(file=(name, content), purpose="batch")


def test_a_file_is_kept_and_read_back_to_the_byte(files_client: openai.OpenAI, place: PlaceOfFiles) -> None:
    for content in (LINES, LARGE):
        kept = upload(files_client, content, "Größe & co.jsonl")
        assert (kept.object, kept.bytes, kept.filename) == ("file", len(content), "Größe & co.jsonl")
        assert (kept.purpose, kept.status) == ("batch", "processed")
        assert kept.expires_at == kept.created_at + 30 * 24 * 3600
        assert files_client.files.retrieve(kept.id) == kept
        assert files_client.files.wait_for_processing(kept.id) == kept
        read = files_client.files.content(kept.id)
        assert read.content == content and read.response.headers["content-length"] == str(len(content))
        assert read.response.headers["x-content-type-options"] == "nosniff"
        assert "filename*=UTF-8''Gr%C3%B6%C3%9Fe%20%26%20co.jsonl" in read.response.headers["content-disposition"]
    assert len(place.names()) == 2


def test_a_deleted_file_is_gone_with_its_bytes(
    files_client: openai.OpenAI, place: PlaceOfFiles, redis_client: redis.Redis
) -> None:
    kept = upload(files_client)
    deleted = files_client.files.delete(kept.id)
    assert (deleted.id, deleted.object, deleted.deleted) == (kept.id, "file", True)
    for call in (files_client.files.retrieve, files_client.files.content, files_client.files.delete):
        with pytest.raises(openai.NotFoundError) as error:
            call(kept.id)
        assert error.value.code == "file_not_found" and error.value.param == "file_id"
    assert list(files_client.files.list()) == []
    wait_until(lambda: not place.names() and not redis_client.exists(file_keys.UNRECORDED_KEY))


def test_an_id_that_is_none_is_not_found_whatever_redis_has_under_it(files_client: openai.OpenAI) -> None:
    kept = upload(files_client)
    for file_id in (f"{kept.id}:parts", kept.id[:-1], "file-x", "*"):
        for call in (files_client.files.retrieve, files_client.files.content, files_client.files.delete):
            with pytest.raises(openai.NotFoundError) as error:
                call(file_id)
            assert error.value.code == "file_not_found"


def test_lists_have_cursors_orders_and_purposes(files_client: openai.OpenAI) -> None:
    kept = [upload(files_client, name=f"{number}.jsonl") for number in range(5)]
    pages = files_client.files.list(limit=2)
    assert pages.has_more and [file.id for file in pages.data] == [kept[4].id, kept[3].id]
    assert list(pages) == list(reversed(kept)), "the client follows the cursors"
    assert list(files_client.files.list(order="asc", after=kept[1].id)) == kept[2:]
    assert list(files_client.files.list(purpose="batch", limit=1)) == list(reversed(kept))
    assert list(files_client.files.list(purpose="batch_output")) == []
    files_client.files.delete(kept[2].id)
    assert [file.id for file in files_client.files.list(after=kept[2].id)] == [kept[1].id, kept[0].id]
    body = httpx.get(f"{files_client.base_url}files", params={"limit": 1}).json()
    assert (body["object"], body["first_id"], body["last_id"]) == ("list", kept[4].id, kept[4].id)
    for wrong in ({"limit": 0}, {"limit": 10_001}, {"order": "up"}, {"after": "file-1"}):
        with pytest.raises(openai.BadRequestError) as error:
            files_client.files.list(**wrong)
        assert error.value.param == next(iter(wrong))


async def test_the_asynchronous_client_does_the_same(start_gateway: StartGateway, place: PlaceOfFiles) -> None:
    url = f"{start_gateway(**place.settings).url}/v1"
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
        policy: dict[str, object] = {"anchor": "created_at", "seconds": 3600}
        uploads = (
            client.files.create(file=(f"{number}", LINES), purpose="batch", expires_after=policy)  # type: ignore[arg-type]
            for number in range(8)
        )
        kept = await asyncio.gather(*uploads)
        assert {file.expires_at - file.created_at for file in kept if file.expires_at} == {3600}
        assert {file.id async for file in await client.files.list(limit=3)} == {file.id for file in kept}
        assert (await client.files.content(kept[0].id)).content == LINES
        assert (await client.files.delete(kept[0].id)).deleted
        with pytest.raises(openai.NotFoundError):
            await client.files.retrieve(kept[0].id)


def test_replicas_share_files(start_gateway: StartGateway, place: PlaceOfFiles) -> None:
    with open_client(start_gateway(**place.settings)) as one, open_client(start_gateway(**place.settings)) as two:
        kept = upload(one)
        assert two.files.retrieve(kept.id) == kept and two.files.content(kept.id).content == LINES
        two.files.delete(kept.id)
        with pytest.raises(openai.NotFoundError):
            one.files.content(kept.id)


def test_expired_files_go_with_their_bytes(
    files_client: openai.OpenAI, place: PlaceOfFiles, redis_client: redis.Redis, start_gateway: StartGateway
) -> None:
    kept, other = upload(files_client), upload(files_client)
    redis_client.hset(file_keys.file_key(kept.id), "expires_at", 1)
    redis_client.zadd(file_keys.EXPIRIES_KEY, {kept.id: 1})
    with pytest.raises(openai.NotFoundError):
        files_client.files.content(kept.id)
    start_gateway(**place.settings)  # cleans up when it starts, as every replica does now and then
    wait_until(lambda: len(place.names()) == 1)
    assert files_client.files.content(other.id).content == LINES


def test_a_file_in_use_is_not_deleted(
    gateway: RunningGateway, client: openai.OpenAI, redis_client: redis.Redis
) -> None:
    kept = upload(client)
    redis_client.sadd(file_keys.holds_key(kept.id), "batch_1")
    with pytest.raises(openai.ConflictError) as error:
        client.files.delete(kept.id)
    assert error.value.code == "file_in_use" and error.value.response.headers["x-should-retry"] == "false"
    redis_client.srem(file_keys.holds_key(kept.id), "batch_1")
    assert client.files.delete(kept.id).deleted


def test_a_file_whose_bytes_are_lost_is_an_error_and_no_empty_answer(
    files_client: openai.OpenAI, place: PlaceOfFiles
) -> None:
    kept = upload(files_client)
    [part] = place.names()
    place.remove(part)
    with pytest.raises(openai.InternalServerError) as error:
        files_client.files.content(kept.id)
    assert (error.value.status_code, error.value.code) == (503, "file_store_error")


def test_a_file_that_still_grows_is_read_as_far_as_it_goes(
    files_client: openai.OpenAI, place: PlaceOfFiles, redis_url: str
) -> None:
    file_id = asyncio.run(_keep_parts(redis_url, place, [b"one\n", LARGE, b"three\n"]))
    growing = files_client.files.retrieve(file_id)
    assert (growing.status, growing.purpose, growing.bytes) == ("uploaded", "batch_output", len(LARGE) + 10)
    assert files_client.files.content(file_id).content == b"one\n" + LARGE + b"three\n"


async def _keep_parts(redis_url: str, place: PlaceOfFiles, contents: list[bytes]) -> str:
    """A file as a batch writes it: part by part."""
    store = select_file_store(place.settings["files"], s3_endpoint_url=place.settings.get("s3_endpoint_url"))
    store.check()
    transport = AsyncTransport(redis_url)
    files = FileRecords(transport, store)
    parts = []
    for number, content in enumerate(contents):
        name = f"part-{number}"
        await files.reserve(name)
        with store.writer(name) as writer:
            writer.write(content)
        parts.append(Part(name, writer.num_bytes))
    file_id = await files.new_id()
    output = FileRecord(id=file_id, filename="out", purpose="batch_output", key_id=None, status="uploaded")
    assert await files.create(output, parts)
    await transport.aclose()
    return file_id
