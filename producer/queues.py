"""The queues that jobs of ours may lie on, and how many lie there, run or have ended."""

from dataclasses import dataclass

from producer.contract import keys
from producer.operations import Protocol, Script, send, slices
from producer.rq_names import QUEUES_KEY, REGISTRIES, job_key, parse_time, queue_key, registry_key
from producer.workers import read_workers

MAX_JOBS_A_READ = 500  # records of the jobs on a queue, or in a registry, in one round trip
MAX_QUEUES_A_READ = 500  # 4,500 commands to Redis: a few milliseconds
_OF_INTEREST = ("started", "failed", "deferred", "scheduled")


@dataclass(frozen=True, slots=True)
class QueueStatus:
    """Numbers of jobs: on the queue's list, and in each of RQ's registries by name (`started`, `finished`, …).

    `oldest_seconds`: how long the job that is next has been waiting; None where none waits, or it does not say.
    """

    name: str
    depth: int
    registries: dict[str, int]
    oldest_seconds: float | None = None

    @property
    def is_at_rest(self) -> bool:
        """Whether it is a tenant's of which no job waits, runs or has failed: the records of its last jobs, which are
        kept for a day, are all it has. People are shown how many such there are: thousands would hide the others."""
        is_tenants = keys.split_tenant(self.name)[1] is not None
        return is_tenants and not self.depth and not any(self.registries[name] for name in _OF_INTEREST)


def read_queues(default_queue: str) -> Protocol[list[QueueStatus]]:
    """The queues that jobs of ours may lie on: the default one's classes, every one a live worker listens to, and those
    of their tenants that have jobs, or had some of late."""
    queues, named = yield from _read_names(default_queue)
    prefixes = [queue_key(""), *(registry_key(registry, "") for registry in REGISTRIES)]
    [seconds, microseconds] = (yield from send(("TIME",)))[0]
    now = int(seconds) + int(microseconds) / 1e6
    statuses = []
    for page in slices(queues, MAX_QUEUES_A_READ):
        found = yield from _COUNT.run([], [job_key(""), len(prefixes), *prefixes, *page])
        rows = {int(at): (times, counts) for at, times, *counts in found}
        for at, name in enumerate(page, start=1):
            if at in rows or name in named:
                times, (depth, *registries) = rows.get(at, ([], [0] * len(prefixes)))
                since = next((time for time in map(parse_time, times) if time is not None), None)
                oldest_seconds = None if since is None else max(0.0, now - since)
                statuses.append(
                    QueueStatus(name, depth, dict(zip(REGISTRIES, registries, strict=True)), oldest_seconds)
                )
    return statuses


def read_queue_names(default_queue: str) -> Protocol[list[str]]:
    """The names of the queues that `read_queues` looks at."""
    names, _ = yield from _read_names(default_queue)
    return names


def _read_names(default_queue: str) -> Protocol[tuple[list[str], set[str]]]:
    """All names, and those that are shown even without a job."""
    workers = yield from read_workers()
    [known] = yield from send(("SMEMBERS", QUEUES_KEY))
    named = {name for worker in workers for name in worker.queues} | set(keys.class_queues(default_queue))
    prefix = queue_key("")
    existing = {name.decode(errors="replace").removeprefix(prefix) for name in known}
    names = sorted(name for name in existing | {default_queue} if name in named or keys.split_tenant(name)[0] in named)
    return names, named


# Of each queue that holds anything: its place among the names, when its first job was enqueued and made, as far as that
# can be read, and how many are on it and in registries.
_COUNT = Script("""
local num_prefixes = tonumber(ARGV[2])
local found = {}
for i = num_prefixes + 3, #ARGV do
  local queue = ARGV[3] .. ARGV[i]
  local first = redis.call('LINDEX', queue, 0)
  local times = first and redis.pcall('HMGET', ARGV[1] .. first, 'enqueued_at', 'created_at') or {}
  local row = {i - num_prefixes - 2, times.err and {} or times, redis.call('LLEN', queue)}
  local sum = row[3]
  for registry = 4, num_prefixes + 2 do
    row[registry] = redis.call('ZCARD', ARGV[registry] .. ARGV[i])
    sum = sum + row[registry]
  end
  if sum > 0 then found[#found + 1] = row end
end
return found
""")
