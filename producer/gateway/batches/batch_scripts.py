"""All Lua that changes batches. Each script may be sent twice, because a reply was lost, without harm.

Whoever carries a batch has a fence, which only `CLAIM` changes: a carrier that was taken for dead, and is not, changes
nothing any more. No two claims have the same, so that a Redis which lost one takes nobody for another.
"""

from producer.gateway.batches.batch_keys import KEY_TTL_SECONDS, RECORD_TTL_SECONDS
from producer.gateway.files.file_keys import FILE_FUNCTIONS
from producer.operations import Script

_FUNCTIONS = (
    FILE_FUNCTIONS
    + """
local function batch_key(id) return 'promptmill:batch:' .. id end
local open = 'promptmill:batches:open'

local function holds_fence(id, fence) return redis.call('HGET', batch_key(id), 'fence') == fence end

-- of a batch that has ended nobody is: what was sent before, and comes late, changes nothing
local function is_carrier(id, fence) return holds_fence(id, fence) and redis.call('ZSCORE', open, id) end

-- whether it was begun, and each of its lines is answered: a Redis that was replaced may have lost what it acknowledged
local function is_answered(id, num_lines)
  return redis.call('HGET', batch_key(id), 'num_lines') == num_lines
    and redis.call('BITCOUNT', batch_key(id) .. ':answered') == tonumber(num_lines)
end

local function file_expire_at(id, seconds)
  redis.call('HSET', 'promptmill:file:' .. id, 'expires_at', seconds)
  redis.call('ZADD', 'promptmill:files:expiries', seconds, id)
end

local function enter(id, status)
  redis.call('HSET', batch_key(id), 'status', status, status .. '_at', math.floor(file_time()))
end
"""
)

CREATE = Script(
    _FUNCTIONS
    + f"""
-- ARGV: id, input file, whose, everybody's, the oldest id that may still have a record, what it was asked for under (or
-- empty) and what was asked, fields… → its id, which may be that of a batch that was made under this name before;
-- conflict, where something else was asked for then; or nothing where there is no such file (any more)
local id, input, whose, everybodys, oldest, name, asked = unpack(ARGV, 1, 7)
if redis.call('EXISTS', batch_key(id)) == 1 then return id end
if name ~= '' then
  local known, before = string.match(redis.call('GET', name) or '', '^(%S+) (%S+)$')
  if known and redis.call('EXISTS', batch_key(known)) == 1 then return before == asked and known or 'conflict' end
end
if not file_hold(input, id) then return false end
if name ~= '' then redis.call('SET', name, id .. ' ' .. asked, 'EX', {KEY_TTL_SECONDS}) end
redis.call('HSET', batch_key(id), 'fence', '', unpack(ARGV, 8))
for _, scope in ipairs({{whose, everybodys}}) do
  local index = 'promptmill:batches:index:' .. scope
  redis.call('ZREMRANGEBYLEX', index, '-', '(' .. oldest)
  redis.call('ZADD', index, 0, id)
end
redis.call('ZADD', open, 0, id)
return id
"""
)

CANCEL = Script(
    _FUNCTIONS
    + """
-- ARGV: id → the status it has now
local id = ARGV[1]
local status = redis.call('HGET', batch_key(id), 'status')
if status == 'validating' or status == 'in_progress' then
  enter(id, 'cancelling')
  return 'cancelling'
end
return status
"""
)

CLAIM = Script(
    _FUNCTIONS
    + """
-- ARGV: lease seconds, fence → nothing, or {id, the hash}
local now = file_time()
for _, id in ipairs(redis.call('ZRANGEBYSCORE', open, '-inf', now, 'LIMIT', 0, 100)) do
  if redis.call('EXISTS', batch_key(id)) == 1 then
    redis.call('ZADD', open, now + tonumber(ARGV[1]), id)
    redis.call('HSET', batch_key(id), 'fence', ARGV[2])
    return {id, redis.call('HGETALL', batch_key(id))}
  end
  redis.call('ZREM', open, id)
end
return false
"""
)

RENEW = Script(
    _FUNCTIONS
    + """
-- ARGV: lease seconds, then id, fence of each → for each: go_on, cancel, expire or lost
local now, orders = file_time(), {}
for i = 2, #ARGV, 2 do
  local id, order = ARGV[i], 'lost'
  if is_carrier(id, ARGV[i + 1]) then
    redis.call('ZADD', open, now + tonumber(ARGV[1]), id)
    local status, expires_at = unpack(redis.call('HMGET', batch_key(id), 'status', 'expires_at'))
    order = status == 'cancelling' and 'cancel' or 'go_on'
    local may_expire = status == 'validating' or status == 'in_progress'
    if may_expire and tonumber(expires_at) <= now then order = 'expire' end
  end
  orders[#orders + 1] = order
end
return orders
"""
)

RELEASE = Script(
    _FUNCTIONS
    + """
-- ARGV: id, fence, seconds until another carrier may have it
if is_carrier(ARGV[1], ARGV[2]) then
  redis.call('ZADD', open, file_time() + tonumber(ARGV[3]), ARGV[1])
end
"""
)

BEGIN = Script(
    _FUNCTIONS
    + """
-- ARGV: id, fence, model, queue, number of lines → the status it has now, or lost
local id, fence, model, queue, num_lines = unpack(ARGV, 1, 5)
if not is_carrier(id, fence) then return 'lost' end
redis.call('HSET', batch_key(id), 'model', model, 'queue', queue, 'num_lines', num_lines)
redis.call('HDEL', batch_key(id), 'unreadable_since', 'unserved_since')
if redis.call('HGET', batch_key(id), 'status') == 'validating' then enter(id, 'in_progress') end
return redis.call('HGET', batch_key(id), 'status')
"""
)

WAIT = Script(
    _FUNCTIONS
    + """
-- ARGV: id, fence, since when it waits (the field's name), more fields… → for how many seconds it waits, or lost
local id, fence, since = unpack(ARGV, 1, 3)
if not is_carrier(id, fence) then return 'lost' end
redis.call('HSETNX', batch_key(id), since, math.floor(file_time()))
if #ARGV > 3 then redis.call('HSET', batch_key(id), unpack(ARGV, 4)) end
return tostring(math.floor(file_time()) - tonumber(redis.call('HGET', batch_key(id), since)))
"""
)

RECORD = Script(
    _FUNCTIONS
    + """
-- ARGV: id, fence, completed, failed, input, cached, output, reasoning tokens, number of files, then of each: field,
-- file id, part, bytes, number of its fields, fields…; then positions of lines → recorded, late, lost, or
-- unanswered where not even its beginning is there (any more)
local id, fence = ARGV[1], ARGV[2]
local key, answered = batch_key(id), batch_key(id) .. ':answered'
if not is_carrier(id, fence) then return 'lost' end
if not redis.call('HGET', key, 'num_lines') then return 'unanswered' end

local files, at = {}, 10
for _ = 1, tonumber(ARGV[9]) do
  local file = {field = ARGV[at], id = ARGV[at + 1], part = ARGV[at + 2], bytes = ARGV[at + 3], fields = {}}
  local num_fields = tonumber(ARGV[at + 4])
  for i = 1, num_fields do file.fields[i] = ARGV[at + 4 + i] end
  files[#files + 1] = file
  at = at + 5 + num_fields
end
-- Lines are answered once: these are already, because the reply to this very call was lost.
if redis.call('GETBIT', answered, ARGV[at]) == 1 then return 'recorded' end

-- All or nothing: a part that is due may be gone from the store by now; or be there again, if it was written since.
for _, file in ipairs(files) do
  local due_at = tonumber(redis.call('ZSCORE', 'promptmill:files:unrecorded', file.part) or 0)
  if due_at <= file_time() then
    for _, written in ipairs(files) do redis.call('ZADD', 'promptmill:files:unrecorded', 0, written.part) end
    return 'late'
  end
end
for _, file in ipairs(files) do
  if redis.call('HSETNX', key, file.field, file.id) == 1 then
    file_create(file.id, file.fields)
    file_hold(file.id, id)
  end
  file_append(redis.call('HGET', key, file.field), file.part, file.bytes)
end
for i = at, #ARGV do redis.call('SETBIT', answered, ARGV[i], 1) end
redis.call('HDEL', key, 'unwritable_since')
local counts = {'num_completed', 'num_failed', 'input_tokens', 'cached_tokens', 'output_tokens', 'reasoning_tokens'}
for i, name in ipairs(counts) do
  redis.call('HINCRBY', key, name, ARGV[2 + i])
end
return 'recorded'
"""
)

FINALIZE = Script(
    _FUNCTIONS
    + """
-- ARGV: id, fence, number of lines → the status it has now, lost or unanswered
local id, fence, num_lines = unpack(ARGV, 1, 3)
if not is_carrier(id, fence) then return 'lost' end
local status = redis.call('HGET', batch_key(id), 'status')
if status ~= 'in_progress' and status ~= 'validating' then return status end
if not is_answered(id, num_lines) then return 'unanswered' end
enter(id, 'finalizing')
return 'finalizing'
"""
)

FINISH = Script(
    _FUNCTIONS
    + f"""
-- ARGV: id, fence, status, problems, how many lines are to be answered (or empty: any), outbox, event → ended, lost or
-- unanswered
local id, fence, status, problems, num_lines, outbox, event = unpack(ARGV, 1, 7)
local key = batch_key(id)
if not holds_fence(id, fence) then return 'lost' end
if not redis.call('ZSCORE', open, id) then return 'ended' end
if num_lines ~= '' and not is_answered(id, num_lines) then return 'unanswered' end

enter(id, status)
if problems ~= '' then redis.call('HSET', key, 'problems', problems) end
local input, output, errors, seconds = unpack(redis.call(
  'HMGET', key, 'input_file_id', 'output_file_id', 'error_file_id', 'output_expires_after'))
for _, file in ipairs({{output or '', errors or ''}}) do
  if file ~= '' then
    file_finish(file)
    if seconds and seconds ~= '' then file_expire_at(file, math.floor(file_time()) + tonumber(seconds)) end
    file_release(file, id)
  end
end
file_release(input, id)
redis.call('ZREM', open, id)
redis.call('HINCRBY', 'promptmill:batches:ended', status, 1)
redis.call('DEL', key .. ':answered')
redis.call('EXPIRE', key, {RECORD_TTL_SECONDS})
redis.call('RPUSH', outbox, event)
return 'ended'
"""
)
