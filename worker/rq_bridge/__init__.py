"""The only package of the worker that imports RQ, whose internals it uses."""

from worker.rq_bridge.bridge import SLOTS_SECONDS, SUSPENDED_KEY, RqBridge
from worker.rq_bridge.held_job import JobReader, calls_back, has_extras, max_call_bytes, timeout_seconds, will_retry
from worker.rq_bridge.outcomes import Outcomes

__all__ = [
    "SLOTS_SECONDS",
    "SUSPENDED_KEY",
    "JobReader",
    "Outcomes",
    "RqBridge",
    "calls_back",
    "has_extras",
    "max_call_bytes",
    "timeout_seconds",
    "will_retry",
]
