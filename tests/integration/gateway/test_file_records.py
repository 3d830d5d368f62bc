"""Files in Redis: recorded whole or not at all, listed by whose they are, kept while they are held, and cleaned up."""

from pathlib import Path

import pytest
import redis

from producer.async_transport import AsyncTransport
from producer.errors import FileStoreError
from producer.gateway.files import file_keys
from producer.gateway.files.file_keys import EVERYBODYS, NOBODYS
from producer.gateway.files.file_records import PAGE_AT_ONCE, FileRecord, FileRecords, Part
from producer.gateway.files.local import LocalFileStore
from producer.operations import Script


@pytest.fixture
def files(transport: AsyncTransport, tmp_path: Path) -> FileRecords:
    return FileRecords(transport, checked_store(tmp_path))


def checked_store(folder: Path) -> LocalFileStore:
    store = LocalFileStore(folder)
    store.check()
    return store


async def add(files: FileRecords, name: str = "a.jsonl", **fields: object) -> FileRecord:
    values = {"id": await files.new_id(), "filename": name, "purpose": "batch", "key_id": None, **fields}
    record = FileRecord.model_validate(values)
    part = Part(f"part-{record.id}", 7)
    await files.reserve(part.name)
    assert await files.create(record, [part])
    return record.model_copy(update={"num_bytes": 7})


async def test_a_file_is_what_was_recorded(files: FileRecords, redis_client: redis.Redis) -> None:
    record = await add(files, "größe.jsonl", key_id="abc", expires_at=4_000_000_000)
    assert await files.get(record.id) == record
    assert await files.parts(record.id) == [Part(f"part-{record.id}", 7)]
    assert abs(record.created_at - redis_client.time()[0]) < 60
    assert await files.get(await files.new_id()) is None


async def test_a_file_whose_part_is_no_longer_reserved_is_not_recorded(
    files: FileRecords, redis_client: redis.Redis
) -> None:
    record = FileRecord(id=await files.new_id(), filename="a", purpose="batch", key_id=None)
    assert not await files.create(record, [Part("never", 1)])
    await files.reserve("slow")
    redis_client.zadd(file_keys.UNRECORDED_KEY, {"slow": 1})
    assert await files.due_parts() == ["slow"]
    assert redis_client.zscore(file_keys.UNRECORDED_KEY, "slow") == 0, "for good, whatever becomes of the clock"
    await files.renew("slow")  # too late
    await files.reserve("slow")
    assert not await files.create(record, [Part("slow", 1)])
    assert await files.get(record.id) is None and (await files.page(whose=EVERYBODYS)).records == []


async def test_a_renewal_that_comes_late_does_not_doom_a_recorded_part(
    files: FileRecords, redis_client: redis.Redis
) -> None:
    record = await add(files)
    await files.renew(f"part-{record.id}")
    assert redis_client.zcard(file_keys.UNRECORDED_KEY) == 0


async def test_recording_and_deleting_twice_is_as_once(files: FileRecords, redis_client: redis.Redis) -> None:
    record = await add(files, key_id="me", expires_at=4_000_000_000)
    assert await files.create(record, [Part(f"part-{record.id}", 7)])
    assert await files.get(record.id) == record
    assert await files.delete(record.id) == "deleted" and await files.delete(record.id) == "absent"
    assert await files.due_parts() == [f"part-{record.id}"]
    await files.forget(f"part-{record.id}")
    assert await files.due_parts() == []
    assert redis_client.keys("promptmill:file*") == [file_keys.STORE_KEY.encode()], "nothing of it is left"


async def test_a_file_of_several_parts_that_is_recorded_twice_is_there_once(files: FileRecords) -> None:
    record = FileRecord(id=await files.new_id(), filename="a", purpose="batch", key_id=None)
    parts = [Part("one", 3), Part("two", 4)]
    for part in parts:
        await files.reserve(part.name)
    assert await files.create(record, parts) and await files.create(record, parts)
    assert await files.parts(record.id) == parts and (await files.get(record.id)) == record.model_copy(
        update={"num_bytes": 7}
    )


async def test_lists_go_by_owner_and_purpose_newest_first(files: FileRecords) -> None:
    mine = [await add(files, key_id="me") for _ in range(3)]
    output = await add(files, key_id="me", purpose="batch_output")
    nobodys = await add(files)
    assert (await files.page(whose="me")).records == [output, *reversed(mine)]
    assert (await files.page(whose="me", purpose="batch", is_ascending=True)).records == mine
    assert (await files.page(whose=NOBODYS)).records == [nobodys]
    assert (await files.page(whose=EVERYBODYS, purpose="batch_output")).records == [output]
    assert len((await files.page(whose=EVERYBODYS)).records) == 5
    assert (await files.page(whose="other")).records == []


async def test_pages_join_without_gap_also_behind_a_deleted_file(files: FileRecords) -> None:
    all_files = [await add(files) for _ in range(PAGE_AT_ONCE + 5)]
    first = await files.page(whose=NOBODYS, limit=PAGE_AT_ONCE + 1, is_ascending=True)
    assert first.records == all_files[: PAGE_AT_ONCE + 1] and first.has_more
    await files.delete(first.records[-1].id)
    rest = await files.page(whose=NOBODYS, after=first.records[-1].id, limit=4, is_ascending=True)
    assert rest.records == all_files[PAGE_AT_ONCE + 1 :] and not rest.has_more


async def test_an_expired_file_is_gone_at_once_and_its_part_with_the_next_round(
    files: FileRecords, redis_client: redis.Redis
) -> None:
    record, other = await add(files, expires_at=4_000_000_000), await add(files)
    redis_client.hset(file_keys.file_key(record.id), "expires_at", 1)
    redis_client.zadd(file_keys.EXPIRIES_KEY, {record.id: 1})
    assert await files.get(record.id) is None and (await files.page(whose=NOBODYS)).records == [other]
    redis_client.zadd(file_keys.EXPIRIES_KEY, {"file-lost": 2})  # what it names is not there
    assert await files.expire() == [record.id, "file-lost"] and await files.expire() == []
    assert await files.due_parts() == [f"part-{record.id}"]
    assert not redis_client.exists(file_keys.file_key(record.id), file_keys.parts_key(record.id))


async def test_a_held_file_is_neither_deleted_nor_expired(files: FileRecords, redis_client: redis.Redis) -> None:
    def hold(file_id: str, holder: str) -> bool:
        script = file_keys.FILE_FUNCTIONS + "return file_hold(ARGV[1], ARGV[2]) and 1 or 0"
        return bool(redis_client.eval(script, 0, file_id, holder))

    record = await add(files, expires_at=4_000_000_000)
    assert hold(record.id, "batch_1") and hold(record.id, "batch_2")
    assert await files.delete(record.id) == "held"
    redis_client.hset(file_keys.file_key(record.id), "expires_at", 1)
    redis_client.zadd(file_keys.EXPIRIES_KEY, {record.id: 1})
    assert not hold(record.id, "batch_3"), "it has expired"
    assert await files.expire() == [] and len(await files.parts(record.id)) == 1
    looked_at_next = redis_client.zscore(file_keys.EXPIRIES_KEY, record.id) or 0
    assert looked_at_next > redis_client.time()[0], "others come first"
    redis_client.srem(file_keys.holds_key(record.id), "batch_1", "batch_2")
    redis_client.zadd(file_keys.EXPIRIES_KEY, {record.id: 1})
    assert await files.expire() == [record.id]
    assert not hold(await files.new_id(), "batch_4")


async def test_a_file_grows_part_by_part_within_somebody_elses_script(
    files: FileRecords, transport: AsyncTransport
) -> None:
    file_id = await files.new_id()
    output = FileRecord(id=file_id, filename="out", purpose="batch_output", key_id="me", status="uploaded")
    assert await files.create(output, [])
    append = Script(file_keys.FILE_FUNCTIONS + "return file_append(ARGV[1], ARGV[2], ARGV[3]) and 1 or 0")
    for part, num_bytes in (("one", 3), ("two", 4)):
        await files.reserve(part)
        for _ in range(2):  # the second time is a repetition
            assert await transport.run(append.run([], [file_id, part, num_bytes])) == 1
    assert await transport.run(append.run([], [file_id, "unreserved", 1])) == 0
    await files.reserve("spare")
    assert await transport.run(append.run([], [await files.new_id(), "spare", 1])) == 0, "there is no such file"
    grown = await files.get(file_id)
    assert grown is not None and (grown.num_bytes, grown.status) == (7, "uploaded")
    finish = Script(file_keys.FILE_FUNCTIONS + "file_finish(ARGV[1])")
    await transport.run(finish.run([], [file_id]))
    assert await files.get(file_id) == grown.model_copy(update={"status": "processed"})
    assert await files.parts(file_id) == [Part("one", 3), Part("two", 4)]


async def test_gateways_with_different_stores_cannot_share_a_redis(
    files: FileRecords, transport: AsyncTransport, tmp_path: Path
) -> None:
    other = FileRecords(transport, checked_store(tmp_path / "other"))
    await other.claim_store()
    await files.claim_store()  # nothing is kept there yet
    record = await add(files)
    for refused in (other.claim_store(), other.reserve("part")):
        with pytest.raises(FileStoreError, match="give all gateways the same one"):
            await refused
    await files.delete(record.id)
    with pytest.raises(FileStoreError, match="give all gateways the same one"):
        await other.claim_store()  # the file's bytes are there yet
    await files.forget(f"part-{record.id}")
    await other.claim_store()
