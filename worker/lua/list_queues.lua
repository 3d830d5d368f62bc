-- Keep tenants' queues on RQ's list for as long as they hold anything: see Scripts.list_queues.
local canceled_seconds = tonumber(ARGV[1])

local function is_idle(queue)
  local names = {queue_key(queue), leases_key(queue), RESULTS .. queue}
  for _, registry in ipairs(REGISTRIES) do names[#names + 1] = registry .. queue end
  return redis.call('EXISTS', unpack(names)) == 0
    and redis.call('ZCOUNT', CANCELLED .. queue, now - canceled_seconds, '+inf') == 0
end

local idle = {}
for i = 2, #ARGV do
  local queue = ARGV[i]
  if is_idle(queue) then
    redis.call('SREM', RQ .. ':queues', queue_key(queue))
    idle[#idle + 1] = queue
  else
    redis.call('SADD', RQ .. ':queues', queue_key(queue))
  end
end
return idle
