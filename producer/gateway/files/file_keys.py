"""What Redis keeps of files, and the Lua that changes it: functions to be put before a script's own lines.

    promptmill:file:ID              HASH: filename, purpose, bytes, created_at, expires_at, status, key_id
    promptmill:file:ID:parts        LIST: "NUM_BYTES:PART", in the file's order
    promptmill:file:ID:holds        SET: who needs the file; it is neither deleted nor expired meanwhile
    promptmill:files:index:SCOPE    ZSET: ids, all scored 0, for lists; SCOPE is WHOSE or WHOSE:PURPOSE
    promptmill:files:expiries       ZSET: ids, scored by their expiry
    promptmill:files:unrecorded     ZSET: parts that belong to no file, scored by the moment from which they may be
                                    deleted. A writer puts its part in before it begins, and renews it; one that died
                                    does not. A part that is due is never recorded any more.
    promptmill:files:store          "IDENTITY WHERE" of the store that holds the parts

An id begins with its creation in microseconds by Redis TIME, so that ids sort by age and a cursor outlives its file.
The functions build key names from ids, so they need one Redis node, as RQ does.
"""

from secrets import token_hex

FILE_PREFIX = "promptmill:file:"
INDEX_PREFIX = "promptmill:files:index:"
EXPIRIES_KEY = "promptmill:files:expiries"
UNRECORDED_KEY = "promptmill:files:unrecorded"
STORE_KEY = "promptmill:files:store"

EVERYBODYS = "*"  # in place of a key's id: whose files an operator sees
NOBODYS = "-"  # of those who came without a key

ID_PREFIX = "file-"
ID_PATTERN = rf"{ID_PREFIX}[0-9a-f]{{30}}"
_MICROSECONDS = 1_000_000


def file_key(file_id: str) -> str:
    return FILE_PREFIX + file_id


def parts_key(file_id: str) -> str:
    return f"{FILE_PREFIX}{file_id}:parts"


def holds_key(file_id: str) -> str:
    return f"{FILE_PREFIX}{file_id}:holds"


def index_key(whose: str, purpose: str | None) -> str:
    return f"{INDEX_PREFIX}{whose}:{purpose}" if purpose is not None else INDEX_PREFIX + whose


def make_id(prefix: str, seconds: int, microseconds: int) -> str:
    """`seconds` and `microseconds` are what TIME says; the last 16 digits are random."""
    return f"{prefix}{seconds * _MICROSECONDS + microseconds:014x}{token_hex(8)}"


def created_at(made_id: str) -> int:
    """Epoch seconds, of an id with any prefix."""
    return int(made_id[-30:-16], 16) // _MICROSECONDS


FILE_FUNCTIONS = """
local function file_time()
  local clock = redis.call('TIME')
  return tonumber(clock[1]) + tonumber(clock[2]) / 1e6
end

local function file_indexes(key)
  local found = redis.call('HMGET', key, 'key_id', 'purpose')
  local whose = found[1] ~= '' and found[1] or '-'
  local prefix = 'promptmill:files:index:'
  return {prefix .. '*', prefix .. '*:' .. found[2], prefix .. whose, prefix .. whose .. ':' .. found[2]}
end

-- The record of a file without parts. `fields` as HSET takes them, all but bytes. One that is there already stays.
local function file_create(id, fields)
  local key = 'promptmill:file:' .. id
  if redis.call('EXISTS', key) == 1 then return end
  redis.call('HSET', key, 'bytes', 0, unpack(fields))
  for _, index in ipairs(file_indexes(key)) do redis.call('ZADD', index, 0, id) end
  local expires_at = redis.call('HGET', key, 'expires_at')
  if expires_at ~= '' then redis.call('ZADD', 'promptmill:files:expiries', expires_at, id) end
end

-- Add a part that was reserved and written. False: it is not the file's, and must not be taken for it.
local function file_append(id, part, num_bytes)
  local key = 'promptmill:file:' .. id
  local entry = num_bytes .. ':' .. part
  if redis.call('LINDEX', key .. ':parts', -1) == entry then return true end  -- sent a second time
  local due_at = tonumber(redis.call('ZSCORE', 'promptmill:files:unrecorded', part) or 0)
  if due_at <= file_time() or redis.call('EXISTS', key) == 0 then return false end
  redis.call('ZREM', 'promptmill:files:unrecorded', part)
  redis.call('RPUSH', key .. ':parts', entry)
  redis.call('HINCRBY', key, 'bytes', num_bytes)
  return true
end

-- Nothing more is appended.
local function file_finish(id)
  local key = 'promptmill:file:' .. id
  if redis.call('EXISTS', key) == 1 then redis.call('HSET', key, 'status', 'processed') end
end

-- False: there is no such file, or it has expired. `holder` is a batch's id.
local function file_hold(id, holder)
  local key = 'promptmill:file:' .. id
  local expires_at = redis.call('HGET', key, 'expires_at')
  if not expires_at or (expires_at ~= '' and tonumber(expires_at) <= file_time()) then return false end
  redis.call('SADD', key .. ':holds', holder)
  return true
end

local function file_release(id, holder)
  redis.call('SREM', 'promptmill:file:' .. id .. ':holds', holder)
end

-- 'deleted', 'absent', or 'held'. Its parts may be deleted from now on.
local function file_delete(id)
  local key = 'promptmill:file:' .. id
  if redis.call('EXISTS', key) == 0 then return 'absent' end
  if redis.call('EXISTS', key .. ':holds') == 1 then return 'held' end
  for _, entry in ipairs(redis.call('LRANGE', key .. ':parts', 0, -1)) do
    redis.call('ZADD', 'promptmill:files:unrecorded', 0, string.match(entry, ':(.+)'))
  end
  for _, index in ipairs(file_indexes(key)) do redis.call('ZREM', index, id) end
  redis.call('ZREM', 'promptmill:files:expiries', id)
  redis.call('DEL', key, key .. ':parts')
  return 'deleted'
end
"""
