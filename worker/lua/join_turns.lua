-- Let tenants' queues that have jobs take turns: see Scripts.join_turns.
for _, queue in ipairs(ARGV) do join_if_waiting(queue) end
