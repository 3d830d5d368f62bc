-- What the scripts share. `Scripts` puts in front of it how queues take turns, and the prefixes of the key names:
-- RQ, WORKERS, MODELS, LEASES, LEASED, FREED, TURNS, RESULTS, FENCE, ATTEMPT, STREAM, STREAM_END, RESUME_FIELD,
-- CRASHES_FIELD, BLAMED_FIELD, CLAIMED_FIELD; CANCELLED and, in a list, REGISTRIES are those of RQ's registries.
local suspended_key = RQ .. ':suspended'
local function job_key(id) return RQ .. ':job:' .. id end
local function queue_key(queue) return RQ .. ':queue:' .. queue end
local function wip_key(queue) return RQ .. ':wip:' .. queue end
local function execution_key(id, execution) return RQ .. ':execution:' .. id .. ':' .. execution end
local function executions_key(id) return RQ .. ':executions:' .. id end
local function worker_executions_key(worker) return RQ .. ':worker:' .. worker .. ':executions' end
local function leases_key(queue) return LEASES .. queue end
local function leased_key(base) return LEASED .. base end
local function turns_key(base) return TURNS .. base end
local function fence_key(id) return FENCE .. id end
local function attempt_key(id) return ATTEMPT .. id end
local function stream_key(id) return STREAM .. id .. STREAM_END end

local clock = redis.call('TIME')
local now = tonumber(clock[1]) + tonumber(clock[2]) / 1e6
local function seconds(value) return string.format('%.6f', value) end

-- a queue NAME@TENANT in its parts; the tenant is nil for a queue that is nobody's
local function split_tenant(queue)
  local base, tenant = string.match(queue, '^(.*)@([^@]*)$')
  return base or queue, tenant
end

local function join_if_waiting(queue)
  if redis.call('EXISTS', queue_key(queue)) == 1 then join_turns(turns_key((split_tenant(queue))), queue) end
end

-- fields of the job's hash: none where it is gone, or its key holds something else by now, as anybody may write it
local function job_fields(id, ...)
  local fields = redis.pcall('HMGET', job_key(id), ...)
  return fields.err and {} or fields
end

local function job_hash(id)
  local all = redis.pcall('HGETALL', job_key(id))
  return all.err and {} or all
end

-- the execution that holds the job, from its fence ATTEMPT:EXECUTION
local function holder(id)
  local fence = redis.call('GET', fence_key(id))
  return fence and string.match(fence, '^%d+:(.+)$')
end

-- the queue that the job was claimed from; `queue` where nothing says so
local function claimed_from(id, queue)
  return redis.call('HGET', execution_key(id, holder(id) or ''), 'queue') or queue
end

-- drop the lease, the fence and RQ's records of the execution that holds the job; the attempt counter stays
local function forget(id, queue)
  local execution = holder(id)
  if execution then
    local composite = id .. ':' .. execution
    local worker = redis.call('HGET', execution_key(id, execution), 'worker_name')
    redis.call('DEL', execution_key(id, execution))
    redis.call('ZREM', wip_key(queue), composite)
    redis.call('ZREM', executions_key(id), execution)
    if worker then redis.call('SREM', worker_executions_key(worker), composite) end
  end
  redis.call('DEL', fence_key(id))
  redis.call('ZREM', leases_key(queue), id)
  local base, tenant = split_tenant(queue)
  if tenant then redis.call('PUBLISH', FREED .. base, queue) end
end

-- the attempt that wrote last, and the last entry's field
local function stream_end(id)
  local found = redis.pcall('XREVRANGE', stream_key(id), '+', '-', 'COUNT', 1)
  if found.err or not found[1] then return 0, '' end
  return tonumber(string.match(found[1][1], '^(%d+)-')), found[1][2][1]
end

-- An attempt is over. It counts once it has written its marker: before, the job was only waiting. A new token clears it
-- of the crashes before; nothing but a lease that ended is a crash.
local function note_end_of_attempt(id, fence, has_crashed)
  local last_attempt, field = stream_end(id)
  if tostring(last_attempt) ~= string.match(fence or '', '^(%d+):') then return end
  local in_a_row, all = string.match(redis.call('HGET', job_key(id), CRASHES_FIELD) or '', '^(%d+):(%d+)$')
  in_a_row, all = tonumber(in_a_row or 0), tonumber(all or 0)
  if field == 'd' then
    in_a_row = 0
    redis.call('HDEL', job_key(id), BLAMED_FIELD)
  end
  if has_crashed then
    if field ~= 'd' then
      in_a_row = in_a_row + 1
      local blamed = redis.call('HGET', job_key(id), BLAMED_FIELD) or ''
      redis.call('HSET', job_key(id), BLAMED_FIELD, blamed .. last_attempt .. ' ')
    end
    all = all + 1
  end
  if all > 0 then redis.call('HSET', job_key(id), CRASHES_FIELD, in_a_row .. ':' .. all) end
end

-- Whether the next attempt may go on from what the stream holds. An attempt that was to start over, and has not got to
-- its marker, leaves there what counts no more.
local function may_resume(id)
  local fence = redis.call('GET', fence_key(id)) or ''
  local attempt, execution = string.match(fence, '^(%d+):(.+)$')
  local last_attempt = stream_end(id)
  if last_attempt == 0 or tostring(last_attempt) == attempt then return true end
  return redis.call('HGET', execution_key(id, execution or ''), 'resumable') ~= '0'
end

-- back to the front of the queue, unless something else than running has become of it
local function give_back(id, queue, resumable, has_crashed, record_ttl)
  local fence = redis.call('GET', fence_key(id))
  resumable = resumable and may_resume(id)
  forget(id, queue)
  local fields = job_fields(id, 'status', 'enqueued_at')
  if fields[1] ~= 'started' then return false end
  note_end_of_attempt(id, fence, has_crashed)
  redis.call('HSET', job_key(id), 'status', 'queued', 'worker_name', '', 'started_at', '')
  if resumable then redis.call('HSET', job_key(id), RESUME_FIELD, fields[2] or '') end
  redis.call('EXPIRE', stream_key(id), record_ttl) -- until the next attempt marks it: none may come
  redis.call('LPUSH', queue_key(queue), id)
  join_turns(turns_key((split_tenant(queue))), queue)
  return true
end

-- a lease, a fence and the next attempt
local function lease(id, queue, execution, lease_seconds, record_ttl)
  local attempt = math.max(tonumber(redis.call('GET', attempt_key(id)) or 0), (stream_end(id))) + 1
  redis.call('SET', attempt_key(id), attempt, 'EX', record_ttl)
  redis.call('SET', fence_key(id), attempt .. ':' .. execution, 'EX', record_ttl)
  redis.call('ZADD', leases_key(queue), seconds(now + lease_seconds), id)
  local base, tenant = split_tenant(queue)
  if tenant then redis.call('SADD', leased_key(base), queue) end
  return attempt
end

-- Redis lost this very claim (a fail-over): the job waits as if it had never been taken, or is another's as it was before.
-- What the attempt has put out was shown, and who comes back to it must not find another attempt's entries under its ids.
local function count_lost_claim(id, fence, record_ttl)
  local status = job_fields(id, 'status')[1]
  if status ~= 'queued' and status ~= 'started' then return end
  local attempt = tonumber(string.match(fence, '^(%d+):'))
  if attempt > tonumber(redis.call('GET', attempt_key(id)) or 0) then
    redis.call('SET', attempt_key(id), attempt, 'EX', record_ttl)
  end
end
