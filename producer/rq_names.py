"""RQ's names and times in Redis; the names are RQ's own, so that its key prefix is honoured. Needs no connection.

What the client writes under them is RQ's wire format, which other languages write too: a job's hash and its queue.
"""

from datetime import UTC, datetime

from rq import Queue
from rq.executions import ExecutionRegistry
from rq.job import Job
from rq.registry import (
    CanceledJobRegistry,
    DeferredJobRegistry,
    FailedJobRegistry,
    FinishedJobRegistry,
    ScheduledJobRegistry,
    StartedJobRegistry,
)
from rq.results import Result

QUEUES_KEY: str = Queue.redis_queues_keys
RQ_PREFIX = QUEUES_KEY.removesuffix(":queues")

REGISTRIES = {
    "started": StartedJobRegistry,
    "finished": FinishedJobRegistry,
    "failed": FailedJobRegistry,
    "cancelled": CanceledJobRegistry,
    "deferred": DeferredJobRegistry,
    "scheduled": ScheduledJobRegistry,
}


def job_key(job_id: str) -> str:
    return f"{Job.redis_job_namespace_prefix}{job_id}"  # Job.key_for() gives bytes in RQ 2, text in RQ 3


def queue_key(queue: str) -> str:
    return f"{Queue.redis_queue_namespace_prefix}{queue}"


def registry_key(name: str, queue: str) -> str:
    """`name` is one of REGISTRIES."""
    return str(REGISTRIES[name].key_template.format(queue))


def ready_key(queue: str) -> str:
    """ZSET of jobs whose dependencies have finished, and that are not on the queue yet: a registry since RQ 3."""
    return f"{RQ_PREFIX}:ready:{queue}"


def dependents_key(job_id: str) -> str:
    """SET of the jobs that wait for this one."""
    return str(Job.dependents_key_for(job_id))


def dependencies_key(job_id: str) -> str:
    """SET of the jobs that this one waits for."""
    return f"{Job.redis_job_namespace_prefix}:{job_id}:dependencies"  # two colons, as RQ has it


def executions_key(job_id: str) -> str:
    return str(ExecutionRegistry.key_template.format(job_id))


def execution_key_prefix(job_id: str) -> str:
    """The key of an execution of the job, but for the execution's id."""
    return f"{RQ_PREFIX}:execution:{job_id}:"


def rq_results_key(job_id: str) -> str:
    """The stream of RQ's own results of the job."""
    return str(Result.get_key(job_id))


def format_time(epoch_seconds: float) -> str:
    """A moment as RQ writes it into its hashes."""
    return datetime.fromtimestamp(epoch_seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def parse_time(text: bytes | None) -> float | None:
    """Epoch seconds of one of RQ's times; None where there is none that could be read: anybody may have written it."""
    try:
        found = datetime.fromisoformat((text or b"").decode())
    except ValueError:  # UnicodeDecodeError among them
        return None
    return (found if found.tzinfo is not None else found.replace(tzinfo=UTC)).timestamp()
