-- Put back the jobs of workers that died: see Scripts.sweep.
local base, lease_seconds, record_ttl = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local limit, execution_prefix = tonumber(ARGV[4]), ARGV[5]

-- jobs whose lease has ended, the last claimed first; and no note of a tenant that has no jobs running
local function find_expired(queue)
  if redis.call('EXISTS', leases_key(queue)) == 0 then redis.call('SREM', leased_key(base), queue) end
  local ids = redis.call('ZRANGEBYSCORE', leases_key(queue), '-inf', seconds(now), 'LIMIT', 0, limit)
  local claimed_at = {}
  for _, id in ipairs(ids) do
    local execution = holder(id)
    claimed_at[id] = tonumber(execution and redis.call('HGET', execution_key(id, execution), 'created_at') or 0)
  end
  table.sort(ids, function(a, b) return claimed_at[a] > claimed_at[b] end)
  return ids
end

-- leased and still queued: either it was enqueued once more, or a claim broke off between the two and it is on no list
local function put_back_queued(id, queue)
  forget(id, queue)
  if redis.call('LPOS', queue_key(queue), id) then return false end
  redis.call('LPUSH', queue_key(queue), id)
  join_turns(turns_key(base), queue)
  return true
end

local given, orphans = {}, {}
local function put_back(id, queue)
  if claimed_from(id, queue) ~= queue then -- of a job that was deleted; another, elsewhere, has its id
    redis.call('ZREM', leases_key(queue), id)
    return
  end
  local status = job_fields(id, 'status')[1]
  if not status or status == 'canceled' then
    local resumable = may_resume(id)
    forget(id, queue)
    local execution = execution_prefix .. (#orphans + 1)
    local attempt = lease(id, queue, execution, lease_seconds, record_ttl)
    redis.call('HSET', execution_key(id, execution), 'resumable', resumable and 1 or 0)
    redis.call('EXPIRE', execution_key(id, execution), record_ttl)
    orphans[#orphans + 1] = {id, queue, attempt, execution, resumable and 1 or 0, job_hash(id)}
  elseif status == 'queued' then
    if put_back_queued(id, queue) then given[#given + 1] = id end
  elseif give_back(id, queue, true, true, record_ttl) then
    given[#given + 1] = id
  end
end

local queues = redis.call('SMEMBERS', leased_key(base))
queues[#queues + 1] = base
for _, queue in ipairs(queues) do
  for _, id in ipairs(find_expired(queue)) do put_back(id, queue) end
end
return {given, orphans}
