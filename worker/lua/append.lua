-- Append to a job's stream, and publish what was stored: see Scripts.append.
local key, expected, publish, ttl = KEYS[1], ARGV[1], ARGV[2] == '1', tonumber(ARGV[3])
local found = redis.call('XREVRANGE', key, '+', '-', 'COUNT', 1)
local last = found[1] and found[1][1] or ''
if expected ~= '' and last ~= expected then return last end
for i = 4, #ARGV, 3 do
  local id, field, data = ARGV[i], ARGV[i + 1], ARGV[i + 2]
  local added = redis.pcall('XADD', key, id, field, data)
  if type(added) == 'table' and added.err then
    if not string.find(added.err, 'equal or smaller', 1, true) then return added end
    return last
  end
  last = id
  if publish and field == 'd' then redis.call('PUBLISH', key, id .. ' ' .. data) end
end
if ttl > 0 then redis.call('EXPIRE', key, ttl) elseif expected == '' then redis.call('PERSIST', key) end
return 'OK'
