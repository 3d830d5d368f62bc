"""The contract between producers and workers: jobs, stream entries, results, errors and Redis names."""

from producer.contract.chunk import Chunk, Done, EntryId, FinishReason, JobOutcome, Marker, Usage, parse_entry
from producer.contract.error import ErrorCode, ErrorInfo
from producer.contract.job import UNSUPPORTED_FIELDS, JobRequest, Message
from producer.contract.logprob import PromptEcho, TokenLogprob, TopLogprob
from producer.contract.problems import Problem, find_problems, summarize
from producer.contract.result import Choice, Result, Timings
from producer.contract.version import CONTRACT_VERSION
from producer.contract.worker_info import WorkerInfo

__all__ = [
    "CONTRACT_VERSION",
    "UNSUPPORTED_FIELDS",
    "Choice",
    "Chunk",
    "Done",
    "EntryId",
    "ErrorCode",
    "ErrorInfo",
    "FinishReason",
    "JobOutcome",
    "JobRequest",
    "Marker",
    "Message",
    "Problem",
    "PromptEcho",
    "Result",
    "Timings",
    "TokenLogprob",
    "TopLogprob",
    "Usage",
    "WorkerInfo",
    "find_problems",
    "parse_entry",
    "summarize",
]
