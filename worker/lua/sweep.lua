-- Put back the jobs of workers that died: see Scripts.sweep.
local queue, lease_seconds, record_ttl = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local limit, execution_prefix = tonumber(ARGV[4]), ARGV[5]
local ids = redis.call('ZRANGEBYSCORE', leases_key(queue), '-inf', seconds(now), 'LIMIT', 0, limit)
local claimed_at = {}
for _, id in ipairs(ids) do
  local execution = holder(id)
  claimed_at[id] = tonumber(execution and redis.call('HGET', execution_key(id, execution), 'created_at') or 0)
end
table.sort(ids, function(a, b) return claimed_at[a] > claimed_at[b] end)

local given, orphans = {}, {}
for _, id in ipairs(ids) do
  local status = redis.call('HGET', job_key(id), 'status')
  if not status or status == 'canceled' then
    forget(id, queue)
    local last_attempt, done = stream_end(id)
    local execution = execution_prefix .. (#orphans + 1)
    local attempt = lease(id, queue, execution, lease_seconds, record_ttl, last_attempt)
    orphans[#orphans + 1] = {id, queue, attempt, execution, 1, done, redis.call('HGETALL', job_key(id))}
  elseif give_back(id, queue) then
    given[#given + 1] = id
  end
end
return {given, orphans}
