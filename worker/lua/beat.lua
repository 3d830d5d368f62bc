-- Renew leases, and learn what became of the jobs: see Scripts.beat.
local lease_seconds, beat_at = tonumber(ARGV[1]), ARGV[2]
local verdicts = {}
for i = 3, #ARGV, 3 do
  local queue, id, fence = ARGV[i], ARGV[i + 1], ARGV[i + 2]
  local verdict = 'lost'
  if redis.call('GET', fence_key(id)) == fence then
    redis.call('ZADD', leases_key(queue), seconds(now + lease_seconds), id)
    local record = execution_key(id, holder(id))
    if redis.call('EXISTS', record) == 1 then redis.call('HSET', record, 'last_heartbeat', seconds(now)) end
    verdict = redis.call('HGET', job_key(id), 'status') or ''
    if verdict ~= '' then redis.call('HSET', job_key(id), 'last_heartbeat', beat_at) end
  end
  verdicts[#verdicts + 1] = verdict
end
return verdicts
