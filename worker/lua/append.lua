-- Append to streams of jobs, and publish what was stored: see Scripts.append.
-- ARGV of each key in turn: expected id, publish, ttl, number of entries, then id, field and JSON of each.
local function append(key, first)
  local expected, publish, ttl = ARGV[first], ARGV[first + 1] == '1', tonumber(ARGV[first + 2])
  local found = redis.pcall('XREVRANGE', key, '+', '-', 'COUNT', 1)
  if found.err then return found end
  local last = found[1] and found[1][1] or ''
  if expected ~= '' and last ~= expected then return last end
  for i = first + 4, first + 1 + 3 * tonumber(ARGV[first + 3]), 3 do
    local id, field, data = ARGV[i], ARGV[i + 1], ARGV[i + 2]
    local added = redis.pcall('XADD', key, id, field, data)
    if type(added) == 'table' and added.err then
      if not string.find(added.err, 'equal or smaller', 1, true) then return added end
      return last
    end
    last = id
    if publish and field == 'd' then redis.call('PUBLISH', key, id .. ' ' .. data) end
  end
  if ttl > 0 then redis.call('EXPIRE', key, ttl) elseif ARGV[first + 5] == 'm' then redis.call('PERSIST', key) end
  return 'OK'
end

local replies, first = {}, 1
for i, key in ipairs(KEYS) do
  replies[i] = append(key, first)
  first = first + 4 + 3 * tonumber(ARGV[first + 3])
end
return replies
