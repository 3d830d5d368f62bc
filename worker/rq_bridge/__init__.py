"""RQ from inside. Nothing else in the worker imports RQ."""

from worker.rq_bridge.bridge import QUEUE_PREFIX, QUEUES_KEY, RQ_PREFIX, SLOTS_SECONDS, SUSPENDED_KEY, RqBridge
from worker.rq_bridge.held_job import (
    JobReader,
    calls_back,
    dependents_key,
    has_extras,
    job_key,
    timeout_seconds,
    will_retry,
)
from worker.rq_bridge.outcomes import Outcomes

__all__ = [
    "QUEUES_KEY",
    "QUEUE_PREFIX",
    "RQ_PREFIX",
    "SLOTS_SECONDS",
    "SUSPENDED_KEY",
    "JobReader",
    "Outcomes",
    "RqBridge",
    "calls_back",
    "dependents_key",
    "has_extras",
    "job_key",
    "timeout_seconds",
    "will_retry",
]
