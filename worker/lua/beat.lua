-- Say that the worker lives, renew leases, and learn what became of the jobs: see Scripts.beat.
local lease_seconds, beat_at, was_away = tonumber(ARGV[1]), ARGV[2], ARGV[3] == '1'
local worker, entry_seconds, record_ttl = ARGV[4], tonumber(ARGV[5]), tonumber(ARGV[6])
local model_ttl, num_models = tonumber(ARGV[7]), tonumber(ARGV[8])

redis.call('ZADD', WORKERS, seconds(now + entry_seconds), worker)
redis.call('ZREMRANGEBYSCORE', WORKERS, '-inf', seconds(now - entry_seconds))
for i = 9, 8 + num_models do redis.call('ZADD', MODELS, seconds(now), ARGV[i]) end
redis.call('ZREMRANGEBYSCORE', MODELS, '-inf', seconds(now - model_ttl))
redis.call('EXPIRE', MODELS, model_ttl)

-- A lease ended while its worker could not reach us, and a sweeper took that for a crash. It was none: the attempt no
-- longer counts among those in a row. It stays among all there were, which bounds how often a job is tried.
local function forgive(id, fence)
  local attempt = string.match(fence, '^(%d+):')
  local fields = job_fields(id, BLAMED_FIELD, CRASHES_FIELD)
  local blamed, num = string.gsub(fields[1] or '', '%f[%d]' .. attempt .. ' ', '')
  local in_a_row, all = string.match(fields[2] or '', '^(%d+):(%d+)$')
  if num == 0 or not all then return end
  redis.call('HSET', job_key(id), CRASHES_FIELD, (tonumber(in_a_row) - 1) .. ':' .. all, BLAMED_FIELD, blamed)
end

-- The job was deleted, and another has its id, which is not to get this one's output: nobody holds it any more.
local function is_replaced(fields)
  return fields[1] and fields[1] ~= 'canceled' and not fields[2]
end

local verdicts = {}
for i = 9 + num_models, #ARGV, 4 do
  local queue, id, fence, is_committing = ARGV[i], ARGV[i + 1], ARGV[i + 2], ARGV[i + 3] == '1'
  local verdict = 'lost'
  local is_held, fields = redis.call('GET', fence_key(id)) == fence, job_fields(id, 'status', CLAIMED_FIELD)
  if is_held and is_replaced(fields) then
    forget(id, queue)
  elseif is_held then
    redis.call('ZADD', leases_key(queue), seconds(now + lease_seconds), id)
    local record = execution_key(id, holder(id))
    if redis.call('EXISTS', record) == 1 then redis.call('HSET', record, 'last_heartbeat', seconds(now)) end
    verdict = fields[1] or ''
    if verdict ~= '' and not is_committing then redis.call('HSET', job_key(id), 'last_heartbeat', beat_at) end
  else
    if was_away then forgive(id, fence) end
    count_lost_claim(id, fence, record_ttl)
  end
  verdicts[#verdicts + 1] = verdict
end
return verdicts
