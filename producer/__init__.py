"""The light client of promptmill: submit prompt jobs, follow their streams, read their results.

A name is imported when it is first used: a worker, which uses the contract alone, starts without the clients.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from producer.async_client import AsyncClient
    from producer.client import Client
    from producer.contract import Choice, Chunk, ErrorCode, ErrorInfo, JobRequest, Message, Result, Usage, WorkerInfo
    from producer.dead_letters import FailedJob
    from producer.deliveries import WebhookCounts
    from producer.dependents import DeferredJob
    from producer.errors import (
        BatchFileError,
        ClientClosedError,
        DurabilityError,
        InvalidJobError,
        JobFailedError,
        JobNotFoundError,
        PromptmillError,
        RedisRefusedError,
        RedisUnavailableError,
        ResultStoreError,
        ResultTimeoutError,
        SettingsError,
    )
    from producer.job import AsyncJob, Job
    from producer.outcome import JobStatus
    from producer.queues import QueueStatus
    from producer.subscription import AsyncSubscription, Subscription

__all__ = [
    "AsyncClient",
    "AsyncJob",
    "AsyncSubscription",
    "BatchFileError",
    "Choice",
    "Chunk",
    "Client",
    "ClientClosedError",
    "DeferredJob",
    "DurabilityError",
    "ErrorCode",
    "ErrorInfo",
    "FailedJob",
    "InvalidJobError",
    "Job",
    "JobFailedError",
    "JobNotFoundError",
    "JobRequest",
    "JobStatus",
    "Message",
    "PromptmillError",
    "QueueStatus",
    "RedisRefusedError",
    "RedisUnavailableError",
    "Result",
    "ResultStoreError",
    "ResultTimeoutError",
    "SettingsError",
    "Subscription",
    "Usage",
    "WebhookCounts",
    "WorkerInfo",
]

_MODULES = {
    "AsyncClient": "producer.async_client",
    "Client": "producer.client",
    "Choice": "producer.contract",
    "Chunk": "producer.contract",
    "ErrorCode": "producer.contract",
    "ErrorInfo": "producer.contract",
    "JobRequest": "producer.contract",
    "Message": "producer.contract",
    "Result": "producer.contract",
    "Usage": "producer.contract",
    "WebhookCounts": "producer.deliveries",
    "WorkerInfo": "producer.contract",
    "FailedJob": "producer.dead_letters",
    "BatchFileError": "producer.errors",
    "ClientClosedError": "producer.errors",
    "DeferredJob": "producer.dependents",
    "DurabilityError": "producer.errors",
    "InvalidJobError": "producer.errors",
    "JobFailedError": "producer.errors",
    "JobNotFoundError": "producer.errors",
    "PromptmillError": "producer.errors",
    "RedisRefusedError": "producer.errors",
    "RedisUnavailableError": "producer.errors",
    "ResultStoreError": "producer.errors",
    "ResultTimeoutError": "producer.errors",
    "SettingsError": "producer.errors",
    "AsyncJob": "producer.job",
    "Job": "producer.job",
    "JobStatus": "producer.outcome",
    "AsyncSubscription": "producer.subscription",
    "Subscription": "producer.subscription",
    "QueueStatus": "producer.queues",
}


if not TYPE_CHECKING:  # a type checker knows the names, and that there are no others

    def __getattr__(name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(_MODULES[name]), name)
        return value
