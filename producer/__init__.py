"""The light client of promptmill: submit prompt jobs, follow their streams, read their results."""

from producer.async_client import AsyncClient
from producer.client import Client
from producer.contract import Choice, Chunk, ErrorCode, ErrorInfo, JobRequest, Message, Result, Usage, WorkerInfo
from producer.dead_letters import FailedJob
from producer.errors import (
    BatchFileError,
    DurabilityError,
    InvalidJobError,
    JobFailedError,
    JobNotFoundError,
    PromptmillError,
    RedisUnavailableError,
    ResultStoreError,
    ResultTimeoutError,
    SettingsError,
)
from producer.job import AsyncJob, Job
from producer.outcome import JobStatus
from producer.subscription import AsyncSubscription, Subscription
from producer.workers import QueueStatus

__all__ = [
    "AsyncClient",
    "AsyncJob",
    "AsyncSubscription",
    "BatchFileError",
    "Choice",
    "Chunk",
    "Client",
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
    "RedisUnavailableError",
    "Result",
    "ResultStoreError",
    "ResultTimeoutError",
    "SettingsError",
    "Subscription",
    "Usage",
    "WorkerInfo",
]
