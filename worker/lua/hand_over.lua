-- Put running jobs back, under their fences: see Scripts.hand_over.
local resumable, record_ttl = ARGV[1] == '1', tonumber(ARGV[2])
local given = {}
for i = #ARGV - 2, 3, -3 do
  local queue, id, fence = ARGV[i], ARGV[i + 1], ARGV[i + 2]
  if redis.call('GET', fence_key(id)) == fence then
    local status = job_fields(id, 'status')[1]
    if not status or status == 'canceled' then
      redis.call('ZADD', leases_key(queue), seconds(now), id) -- its outcome is owed: the next sweep sees to it
    elseif give_back(id, queue, resumable, false, record_ttl) then
      given[#given + 1] = id
    end
  else
    count_lost_claim(id, fence, record_ttl)
  end
end
return given
