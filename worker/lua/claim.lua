-- Take jobs off queues in one step: see Scripts.claim.
local request, worker, lease_seconds, record_ttl = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local started_at, claim_ttl, max_jobs = ARGV[5], tonumber(ARGV[6]), tonumber(ARGV[7])
local tenant_limit, tenant_limits = tonumber(ARGV[8]), cjson.decode(ARGV[9])
local num_tenant_queues = tonumber(ARGV[10])
local bases = {unpack(ARGV, 11 + num_tenant_queues)}
local MAX_DROPPED = 1000 -- of one claim: where thousands have expired in a queue, Redis serves others in between

local function describe(claim)
  return {claim[1], claim[2], claim[3], claim[4], claim[5], job_hash(claim[1])}
end

local stored = redis.call('GET', KEYS[1])
local past = stored and cjson.decode(stored)
if past and past.request == request then
  local claims = {}
  for _, claim in ipairs(past.claims) do
    if redis.call('GET', fence_key(claim[1])) == claim[3] .. ':' .. claim[4] then
      claims[#claims + 1] = describe(claim)
    end
  end
  return {claims, {}}
end
if redis.call('EXISTS', suspended_key) == 1 then return 'suspended' end

-- a job that is running was enqueued once more: it runs once, and RQ's fields say so again
local function undo_requeue(id, queue)
  local running = redis.call('HGET', execution_key(id, holder(id) or ''), 'worker_name')
  redis.call('HSET', job_key(id), 'status', 'started', 'worker_name', running or '', 'started_at', started_at,
    'origin', queue)
end

-- a job that nobody can run under its id: whoever waits for it finds the reason in RQ's own field
local function fail_malformed(id)
  if redis.call('TYPE', job_key(id)).ok == 'hash' then
    redis.call('HSET', job_key(id), 'status', 'failed', 'exc_info', 'a job id consists of letters, digits, _ and -, 256 at most')
    redis.call('EXPIRE', job_key(id), record_ttl)
  end
end

-- why a job on the list is not to be run, or nil
local function refusal(id, queue)
  if #id > 256 or not string.match(id, '^[%w_-]+$') then
    fail_malformed(id)
    return 'malformed id'
  end
  local fields = redis.pcall('HMGET', job_key(id), 'status', 'data', CLAIMED_FIELD)
  if fields.err then return 'its key is no hash' end
  if not fields[1] and not fields[2] then return 'its hash is gone' end
  if fields[1] and fields[1] ~= 'queued' then return 'status ' .. fields[1] end
  local from = claimed_from(id, queue)
  local score = redis.call('ZSCORE', leases_key(from), id)
  if not score then return nil end
  if tonumber(score) > now and fields[3] then -- else it was deleted, and this is another
    undo_requeue(id, from)
    return 'it is running'
  end
  forget(id, from)
  return nil
end

local function start(id, queue, execution, order)
  local attempt = lease(id, queue, execution, lease_seconds, record_ttl)
  local fields = redis.call('HMGET', job_key(id), RESUME_FIELD, 'enqueued_at')
  local resumable = fields[1] and fields[1] == (fields[2] or '')
  redis.call('HDEL', job_key(id), RESUME_FIELD)
  if not resumable then redis.call('HDEL', job_key(id), CRASHES_FIELD, BLAMED_FIELD) end
  redis.call('HSET', job_key(id), 'status', 'started', 'started_at', started_at, 'last_heartbeat', started_at,
    'worker_name', worker, CLAIMED_FIELD, 1)
  redis.call('PERSIST', job_key(id))
  local composite, expiry = id .. ':' .. execution, seconds(now + record_ttl)
  -- created_at keeps the order of claims: a script's clock stands still
  redis.call('HSET', execution_key(id, execution), 'id', execution, 'job_id', id, 'worker_name', worker, 'queue', queue,
    'created_at', seconds(now + order / 1e6), 'last_heartbeat', seconds(now), 'resumable', resumable and 1 or 0)
  redis.call('EXPIRE', execution_key(id, execution), record_ttl)
  redis.call('ZADD', executions_key(id), expiry, execution)
  redis.call('EXPIRE', executions_key(id), record_ttl)
  redis.call('ZADD', wip_key(queue), expiry, composite)
  redis.call('SADD', worker_executions_key(worker), composite)
  redis.call('EXPIRE', worker_executions_key(worker), record_ttl)
  return {id, queue, attempt, execution, resumable and 1 or 0}
end

-- jobs of a tenant that any worker holds, in all classes
local held = {}
local function num_held(tenant)
  if not held[tenant] then
    local queues, num = {}, 0
    for _, base in ipairs(bases) do queues[split_tenant(base) .. '@' .. tenant] = true end
    for queue in pairs(queues) do num = num + redis.call('ZCARD', leases_key(queue)) end
    held[tenant] = num
  end
  return held[tenant]
end

local function is_at_limit(tenant)
  local limit = tenant_limits[tenant] or tenant_limit
  return limit ~= nil and num_held(tenant) >= limit
end

local claims, dropped = {}, {}

-- the next job off the queue: whether it is one to be run; nil if there is none
local function take(queue)
  local id = redis.call('LPOP', queue_key(queue))
  if not id then return nil end
  local why = refusal(id, queue)
  if why then
    dropped[#dropped + 1] = {id, why}
  else
    claims[#claims + 1] = start(id, queue, request .. '-' .. (#claims + 1), #claims)
  end
  return not why
end

-- a job from each queue in turn: of `base` itself and of its tenants
local function take_turns(base)
  local turns, num_passed_over = turns_key(base), 0
  join_if_waiting(base)
  while #claims < max_jobs and #dropped < MAX_DROPPED do
    local queue = redis.call('ZRANGE', turns, num_passed_over, num_passed_over)[1]
    if not queue then return end
    local _, tenant = split_tenant(queue)
    if tenant and is_at_limit(tenant) then
      num_passed_over = num_passed_over + 1 -- it keeps its place in the order
    else
      local is_taken = take(queue)
      if is_taken == nil then
        redis.call('ZREM', turns, queue)
      elseif is_taken then
        redis.call('ZADD', turns, next_turn(turns), queue)
        if tenant and held[tenant] then held[tenant] = held[tenant] + 1 end
      end -- else it keeps its turn
    end
  end
end

for i = 11, 10 + num_tenant_queues do join_if_waiting(ARGV[i]) end
for _, base in ipairs(bases) do take_turns(base) end
if #claims > 0 then
  redis.call('SET', KEYS[1], cjson.encode({request = request, claims = claims}), 'EX', claim_ttl)
end
local described = {}
for i, claim in ipairs(claims) do described[i] = describe(claim) end
return {described, dropped}
