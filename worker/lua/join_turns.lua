-- Let tenants' queues that have jobs take turns: see Scripts.join_turns.
for _, queue in ipairs(ARGV) do
  if redis.call('EXISTS', queue_key(queue)) == 1 then join_turns(queue, (split_tenant(queue))) end
end
