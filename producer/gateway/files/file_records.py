"""Files as Redis knows them: whose they are, what they are called, and which parts they consist of, in which order.

Owns every change of `file_keys`' keys that is not part of another module's script. Touches no bytes: it names the parts
to delete from the store (`due_parts`).
"""

from dataclasses import dataclass
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict

from producer.async_transport import AsyncTransport
from producer.errors import FileStoreError
from producer.gateway.files import file_keys
from producer.gateway.files.base import FileStore
from producer.operations import Script, send

Purpose = Literal["batch", "batch_output"]

RESERVED_SECONDS = 120.0  # until a writer that is silent counts as dead, and its part is deleted
DUE_AT_ONCE = 500  # parts, or files, of one round of cleaning up
PAGE_AT_ONCE = 500  # records read in one round trip


class FileRecord(BaseModel):
    """`status` is `uploaded` while parts may still be added. An id is made by `FileRecords.new_id`."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    id: str
    filename: str
    purpose: Purpose
    key_id: str | None  # of the API key whose file it is; None: no key was needed
    expires_at: int | None = None  # epoch seconds
    status: Literal["uploaded", "processed"] = "processed"
    num_bytes: int = 0

    @property
    def created_at(self) -> int:
        """Epoch seconds."""
        return file_keys.created_at(self.id)

    @property
    def fields(self) -> list[str | int]:
        """As `file_create` takes them."""
        return [
            *("filename", self.filename),
            *("purpose", self.purpose),
            *("created_at", self.created_at),
            *("expires_at", "" if self.expires_at is None else self.expires_at),
            *("status", self.status),
            *("key_id", self.key_id or ""),
        ]


@dataclass(frozen=True, slots=True)
class Part:
    name: str
    num_bytes: int

    @classmethod
    def parse(cls, entry: bytes) -> Self:
        num_bytes, _, name = entry.decode().partition(":")
        return cls(name, int(num_bytes))


@dataclass(frozen=True, slots=True)
class FilePage:
    records: list[FileRecord]
    has_more: bool


class FileRecords:
    """Every method raises RedisUnavailableError where Redis cannot be reached, after a few tries."""

    def __init__(self, redis: AsyncTransport, store: FileStore) -> None:
        """`store` has been checked; what is recorded are its parts."""
        self._redis = redis
        self._store = [store.identity, store.where]

    async def new_id(self) -> str:
        [(seconds, microseconds)] = await self._redis.run(send(("TIME",)))
        return file_keys.make_id(file_keys.ID_PREFIX, int(seconds), int(microseconds))

    async def claim_store(self) -> None:
        """All gateways on this Redis must share one store. Raises FileStoreError naming the other one."""
        keys = [file_keys.STORE_KEY, file_keys.UNRECORDED_KEY]  # of two slots: a cluster refuses them before it writes
        other = await self._redis.run(_CLAIM_STORE.run(keys, self._store))
        self._refuse_other(other)

    async def reserve(self, part: str) -> None:
        """Called before a part is written: if the writer dies, the part is deleted after RESERVED_SECONDS. Raises
        FileStoreError as `claim_store` does."""
        arguments = [*self._store, part, RESERVED_SECONDS]
        other = await self._redis.run(_RESERVE.run([], arguments))
        self._refuse_other(other)

    async def renew(self, part: str) -> None:
        """Reserve the part for another RESERVED_SECONDS. Does nothing to one that is recorded, forgotten or due."""
        await self._redis.run(_RENEW.run([], [part, RESERVED_SECONDS]))

    async def discard(self, part: str) -> None:
        """Make a part due at once that was written, but could not be recorded."""
        await self._redis.run(send(("ZADD", file_keys.UNRECORDED_KEY, 0, part)))

    async def forget(self, part: str) -> None:
        """Forget a part of which nothing is left in the store."""
        await self._redis.run(send(("ZREM", file_keys.UNRECORDED_KEY, part)))

    async def create(self, record: FileRecord, parts: list[Part]) -> bool:
        """Record the file with all its parts, or nothing. False: a part's reservation was over, so that it may be gone;
        `discard` it."""
        arguments = [record.id, len(record.fields), *record.fields]
        for part in parts:
            arguments += [part.name, part.num_bytes]
        is_created = await self._redis.run(_CREATE.run([], arguments))
        return bool(is_created)

    async def get(self, file_id: str) -> FileRecord | None:
        """None: there is none, or it has expired."""
        now, values = await self._redis.run(send(("TIME",), ("HGETALL", file_keys.file_key(file_id))))
        return _parse(file_id, values, int(now[0]))

    async def parts(self, file_id: str) -> list[Part]:
        """In order, as of now; also of a file that has expired while somebody holds it."""
        [entries] = await self._redis.run(send(("LRANGE", file_keys.parts_key(file_id), 0, -1)))
        return [Part.parse(entry) for entry in entries]

    async def page(
        self,
        *,
        whose: str,
        purpose: str | None = None,
        after: str | None = None,
        limit: int = 10_000,
        is_ascending: bool = False,
    ) -> FilePage:
        """`whose`: a key's id, EVERYBODYS or NOBODYS. `after`: an id, of a file that may be gone by now."""
        found: list[FileRecord] = []
        index = file_keys.index_key(whose, purpose)
        while len(found) <= limit:
            [ids] = await self._redis.run(send(_range_of_ids(index, after, is_ascending=is_ascending)))
            found += await self._read([file_id.decode() for file_id in ids])
            if len(ids) < PAGE_AT_ONCE:
                break
            after = ids[-1].decode()
        return FilePage(found[:limit], len(found) > limit)

    async def delete(self, file_id: str) -> Literal["deleted", "absent", "held"]:
        """Delete the record at once; its parts are due from now on."""
        outcome = await self._redis.run(_DELETE.run([], [file_id]))
        what_became: Literal["deleted", "absent", "held"] = outcome.decode()
        return what_became

    async def expire(self) -> list[str]:
        """Delete files that have expired and nobody holds; their ids, at most DUE_AT_ONCE."""
        ids = await self._redis.run(_EXPIRE.run([], [DUE_AT_ONCE]))
        return [file_id.decode() for file_id in ids]

    async def due_parts(self) -> list[str]:
        """Parts to be deleted from the store, at most DUE_AT_ONCE. They belong to no file, and never will."""
        parts = await self._redis.run(_DUE.run([], [DUE_AT_ONCE]))
        return [part.decode() for part in parts]

    def _refuse_other(self, other: bytes) -> None:
        if other:
            raise FileStoreError(
                f"the files of this Redis lie in {other.decode()}, and this gateway's --files is {self._store[1]}: "
                f"give all gateways the same one; to move, copy its content and delete the key {file_keys.STORE_KEY}"
            )

    async def _read(self, ids: list[str]) -> list[FileRecord]:
        """Those that are there and have not expired."""
        now, *all_values = await self._redis.run(
            send(("TIME",), *(("HGETALL", file_keys.file_key(file_id)) for file_id in ids))
        )
        records = (_parse(file_id, values, int(now[0])) for file_id, values in zip(ids, all_values, strict=True))
        return [record for record in records if record is not None]


def _parse(file_id: str, values: dict[bytes, bytes], now: int) -> FileRecord | None:
    if not values:
        return None
    fields = {name.decode(): value.decode() for name, value in values.items()}
    record = FileRecord.model_validate(
        {
            **fields,
            "id": file_id,
            "num_bytes": fields["bytes"],
            "key_id": fields["key_id"] or None,
            "expires_at": fields["expires_at"] or None,
        }
    )
    return record if record.expires_at is None or record.expires_at > now else None


def _range_of_ids(index: str, after: str | None, *, is_ascending: bool) -> tuple[str | int, ...]:
    behind = f"({after}" if after is not None else None
    if is_ascending:
        return ("ZRANGEBYLEX", index, behind or "-", "+", "LIMIT", 0, PAGE_AT_ONCE)
    return ("ZREVRANGEBYLEX", index, behind or "+", "-", "LIMIT", 0, PAGE_AT_ONCE)


_STORE_FUNCTION = """
-- '', or where the store lies that this Redis' files are in. Without any file, another may take its place.
local function other_store(identity, where)
  local store = redis.call('GET', 'promptmill:files:store')
  if store and string.match(store, '^%S+') ~= identity then
    if redis.call('EXISTS', 'promptmill:files:index:*', 'promptmill:files:unrecorded') > 0 then
      return string.match(store, ' (.*)')
    end
    store = nil
  end
  if not store then redis.call('SET', 'promptmill:files:store', identity .. ' ' .. where) end
  return ''
end
"""

_CLAIM_STORE = Script(_STORE_FUNCTION + "return other_store(ARGV[1], ARGV[2])")

_RESERVE = Script(
    file_keys.FILE_FUNCTIONS
    + _STORE_FUNCTION
    + """
local other = other_store(ARGV[1], ARGV[2])
if other == '' then
  redis.call('ZADD', 'promptmill:files:unrecorded', 'NX', file_time() + tonumber(ARGV[4]), ARGV[3])
end
return other
"""
)

_RENEW = Script(
    file_keys.FILE_FUNCTIONS
    + """
local key, now = 'promptmill:files:unrecorded', file_time()
local due_at = redis.call('ZSCORE', key, ARGV[1])
if due_at and tonumber(due_at) > now then redis.call('ZADD', key, 'XX', now + tonumber(ARGV[2]), ARGV[1]) end
"""
)

_CREATE = Script(
    file_keys.FILE_FUNCTIONS
    + """
local id, num_fields, fields = ARGV[1], tonumber(ARGV[2]), {}
for i = 1, num_fields do fields[i] = ARGV[2 + i] end
if redis.call('EXISTS', 'promptmill:file:' .. id) == 1 then return 1 end  -- sent a second time
file_create(id, fields)
for i = 3 + num_fields, #ARGV, 2 do
  if not file_append(id, ARGV[i], ARGV[i + 1]) then
    file_delete(id)
    return 0
  end
end
return 1
"""
)

_DELETE = Script(file_keys.FILE_FUNCTIONS + "return file_delete(ARGV[1])")

_EXPIRE = Script(
    file_keys.FILE_FUNCTIONS
    + """
local expiries, now, gone = 'promptmill:files:expiries', file_time(), {}
for _, id in ipairs(redis.call('ZRANGEBYSCORE', expiries, '-inf', now, 'LIMIT', 0, ARGV[1])) do
  local outcome = file_delete(id)
  if outcome == 'held' then
    redis.call('ZADD', expiries, now + 60, id)  -- looked at again later, and not in the way of others
  else
    redis.call('ZREM', expiries, id)
    gone[#gone + 1] = id
  end
end
return gone
"""
)

_DUE = Script(
    file_keys.FILE_FUNCTIONS
    + """
local key = 'promptmill:files:unrecorded'
local due = redis.call('ZRANGEBYSCORE', key, '-inf', file_time(), 'LIMIT', 0, ARGV[1])
for _, part in ipairs(due) do redis.call('ZADD', key, 0, part) end  -- for good, whatever becomes of the clock
return due
"""
)
