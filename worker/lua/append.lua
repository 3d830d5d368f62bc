-- Append to streams of jobs, and publish what was stored: see Scripts.append.
-- KEYS: the streams, then their fences. ARGV: the TTL of streams that end, then of each: fence, expected id, flags (p:
-- publish, e: it ends), number of entries, then id, field and JSON of each entry.
local num_streams, ttl = #KEYS / 2, ARGV[1]

local function append(key, found_fence, first)
  if (found_fence or '') ~= ARGV[first] then return 'fenced' end
  local expected, flags = ARGV[first + 1], ARGV[first + 2]
  local found = redis.pcall('XREVRANGE', key, '+', '-', 'COUNT', 1)
  if found.err then return found end
  local last = found[1] and found[1][1] or ''
  if expected ~= '' and last ~= expected then return last end
  local publish, is_end = flags == 'p' or flags == 'pe', flags == 'e' or flags == 'pe'
  for i = first + 4, first + 1 + 3 * ARGV[first + 3], 3 do
    local id, field, data = ARGV[i], ARGV[i + 1], ARGV[i + 2]
    local added = redis.pcall('XADD', key, id, field, data)
    if type(added) == 'table' and added.err then
      if not string.find(added.err, 'equal or smaller', 1, true) then return added end
      return last
    end
    last = id
    if publish and field == 'd' then redis.call('PUBLISH', key, id .. ' ' .. data) end
  end
  if is_end then redis.call('EXPIRE', key, ttl) elseif ARGV[first + 5] == 'm' then redis.call('PERSIST', key) end
  return 'OK'
end

local fences = redis.call('MGET', unpack(KEYS, num_streams + 1))
local replies, first = {}, 2
for i = 1, num_streams do
  replies[i] = append(KEYS[i], fences[i], first)
  first = first + 4 + 3 * ARGV[first + 3]
end
return replies
