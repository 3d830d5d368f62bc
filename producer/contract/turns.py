"""How queues take turns, in Lua, for every script that puts a job onto one: see `keys.turns_key`."""

TURNS_SCRIPT = """
local function next_turn(turns)
  return (tonumber(redis.call('ZREVRANGE', turns, 0, 0, 'WITHSCORES')[2]) or 0) + 1
end

-- the queue has jobs waiting: if it does not take turns yet, its first is after everybody else's
local function join_turns(turns, queue)
  redis.call('ZADD', turns, 'NX', next_turn(turns), queue)
end
"""
