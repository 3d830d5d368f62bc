-- Say that the worker lives, renew leases, and learn what became of the jobs: see Scripts.beat.
local lease_seconds, beat_at, was_away = tonumber(ARGV[1]), ARGV[2], ARGV[3] == '1'
local worker, entry_seconds = ARGV[4], tonumber(ARGV[5])

redis.call('ZADD', WORKERS, seconds(now + entry_seconds), worker)
redis.call('ZREMRANGEBYSCORE', WORKERS, '-inf', seconds(now - entry_seconds))

-- A lease ended while its worker could not reach us, and a sweeper took that for a crash. It was none: the attempt no
-- longer counts among those in a row. It stays among all there were, which bounds how often a job is tried.
local function forgive(id, fence)
  local attempt = string.match(fence, '^(%d+):')
  local blamed, num = string.gsub(redis.call('HGET', job_key(id), BLAMED_FIELD) or '', '%f[%d]' .. attempt .. ' ', '')
  if num == 0 then return end
  local in_a_row, all = string.match(redis.call('HGET', job_key(id), CRASHES_FIELD), '^(%d+):(%d+)$')
  redis.call('HSET', job_key(id), CRASHES_FIELD, (tonumber(in_a_row) - 1) .. ':' .. all, BLAMED_FIELD, blamed)
end

local verdicts = {}
for i = 6, #ARGV, 3 do
  local queue, id, fence = ARGV[i], ARGV[i + 1], ARGV[i + 2]
  local verdict = 'lost'
  if redis.call('GET', fence_key(id)) == fence then
    redis.call('ZADD', leases_key(queue), seconds(now + lease_seconds), id)
    local record = execution_key(id, holder(id))
    if redis.call('EXISTS', record) == 1 then redis.call('HSET', record, 'last_heartbeat', seconds(now)) end
    verdict = redis.call('HGET', job_key(id), 'status') or ''
    if verdict ~= '' then redis.call('HSET', job_key(id), 'last_heartbeat', beat_at) end
  elseif was_away then
    forgive(id, fence)
  end
  verdicts[#verdicts + 1] = verdict
end
return verdicts
