-- Append to streams of jobs, and publish what was stored: see Scripts.append.
-- KEYS: the streams, then their fences. ARGV: the TTL of streams that end, then of each: fence, expected id, flags (p:
-- publish, e: it ends, c: a commit follows, n: the number of entries follows, which else is 1, r: the key of RQ's record
-- follows, which must want the job), then id and JSON of each entry, a marker if the id ends with -0. A commit: number of
-- arguments, key of the dependents, then commands, each behind the number of its arguments.
local num_streams, ttl = #KEYS / 2, ARGV[1]

-- whether RQ knows this very job (Scripts' CLAIMED_FIELD), and does not want it cancelled
local function is_wanted(record)
  local fields = redis.pcall('HMGET', record, 'status', 'promptmill_claimed')
  return fields[1] and fields[1] ~= 'canceled' and fields[2]
end

-- as in a transaction, a command that fails keeps none of the others from taking effect
local function commit(first, last)
  local problem = ''
  while first <= last do
    local reply = redis.pcall(unpack(ARGV, first + 1, first + ARGV[first]))
    if type(reply) == 'table' and reply.err then problem = problem .. ' ' .. reply.err end
    first = first + 1 + ARGV[first]
  end
  return 'OK' .. problem
end

-- Whether a stream has just the entries up to that of an id. All of a first attempt's are its own, numbered from 0.
local function ends_with_first_attempt(key, id)
  return string.sub(id, 1, 2) == '1-' and redis.pcall('XLEN', key) == string.sub(id, 3) + 1
end

local function append(key, found_fence, first, flags, record, entries_begin, entries_end, commit_end)
  if (found_fence or '') ~= ARGV[first] then return 'fenced' end
  local expected = ARGV[first + 1]
  local last = expected
  if not ends_with_first_attempt(key, expected) then
    local found = redis.pcall('XREVRANGE', key, '+', '-', 'COUNT', 1)
    if found.err then return found end
    last = found[1] and found[1][1] or ''
    if expected ~= '' and last ~= expected then return last end
  end
  if record and not is_wanted(record) then return 'contested' end
  if commit_end and redis.call('EXISTS', ARGV[entries_end + 2]) == 1 then return 'contested' end
  local publish = flags == 'p' or string.find(flags, 'p', 1, true)
  for i = entries_begin, entries_end, 2 do
    local id, data = ARGV[i], ARGV[i + 1]
    local field = string.sub(id, -2) == '-0' and 'm' or 'd'
    local added = redis.pcall('XADD', key, id, field, data)
    if type(added) == 'table' and added.err then
      if not string.find(added.err, 'equal or smaller', 1, true) then return added end
      return last
    end
    last = id
    if publish and field == 'd' then redis.call('PUBLISH', key, id .. ' ' .. data) end
  end
  if string.find(flags, 'e', 1, true) then
    redis.call('EXPIRE', key, ttl)
  elseif string.sub(ARGV[entries_begin], -2) == '-0' then
    redis.call('PERSIST', key)
  end
  return commit_end and commit(entries_end + 3, commit_end) or 'OK'
end

local fences = redis.call('MGET', unpack(KEYS, num_streams + 1))
local replies, first = {}, 2
for i = 1, num_streams do
  local flags, entries_begin, num_entries, record, commit_end = ARGV[first + 2], first + 3, 1, nil, nil
  if flags ~= 'p' and string.find(flags, 'n', 1, true) then
    entries_begin, num_entries = first + 4, ARGV[first + 3]
  end
  if #flags > 1 and string.find(flags, 'r', 1, true) then
    entries_begin, record = entries_begin + 1, ARGV[entries_begin]
  end
  local entries_end = entries_begin - 1 + 2 * num_entries
  if #flags > 1 and string.find(flags, 'c', 1, true) then commit_end = entries_end + 1 + ARGV[entries_end + 1] end
  replies[i] = append(KEYS[i], fences[i], first, flags, record, entries_begin, entries_end, commit_end)
  first = (commit_end or entries_end) + 1
end
return replies
