-- Append to streams of jobs, and publish what was stored: see Scripts.append.
-- KEYS: stream and fence of each. ARGV of each: fence, expected id, publish, ttl, number of entries, then id, field and
-- JSON of each entry.
local function append(key, fence_key, first)
  if (redis.call('GET', fence_key) or '') ~= ARGV[first] then return 'fenced' end
  local expected, publish, ttl = ARGV[first + 1], ARGV[first + 2] == '1', tonumber(ARGV[first + 3])
  local found = redis.pcall('XREVRANGE', key, '+', '-', 'COUNT', 1)
  if found.err then return found end
  local last = found[1] and found[1][1] or ''
  if expected ~= '' and last ~= expected then return last end
  for i = first + 5, first + 2 + 3 * tonumber(ARGV[first + 4]), 3 do
    local id, field, data = ARGV[i], ARGV[i + 1], ARGV[i + 2]
    local added = redis.pcall('XADD', key, id, field, data)
    if type(added) == 'table' and added.err then
      if not string.find(added.err, 'equal or smaller', 1, true) then return added end
      return last
    end
    last = id
    if publish and field == 'd' then redis.call('PUBLISH', key, id .. ' ' .. data) end
  end
  if ttl > 0 then redis.call('EXPIRE', key, ttl) elseif ARGV[first + 6] == 'm' then redis.call('PERSIST', key) end
  return 'OK'
end

local replies, first = {}, 1
for i = 1, #KEYS, 2 do
  replies[#replies + 1] = append(KEYS[i], KEYS[i + 1], first)
  first = first + 5 + 3 * tonumber(ARGV[first + 4])
end
return replies
