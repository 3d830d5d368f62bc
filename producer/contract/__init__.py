"""The contract between producers and workers: jobs, stream entries, results, errors and Redis names."""

from producer.contract.chunk import (
    Chunk,
    Done,
    EntryId,
    FinishReason,
    JobOutcome,
    Marker,
    Usage,
    parse_entry,
    plain_chunk_to_wire,
)
from producer.contract.error import NO_REASON, ErrorCode, ErrorInfo
from producer.contract.job import RESERVED_TEMPLATE_NAMES, JobRequest
from producer.contract.logprob import PromptEcho, TokenLogprob, TopLogprob
from producer.contract.message import Message, ToolCallMessage
from producer.contract.problems import Problem, find_problems, summarize
from producer.contract.result import Choice, Result, Timings
from producer.contract.tool import NamedToolChoice, tool_names
from producer.contract.tool_call import ToolCall, ToolCallDelta, join_deltas, merge_deltas, rest_of_calls
from producer.contract.version import CONTRACT_VERSION
from producer.contract.worker_info import WorkerInfo

__all__ = [
    "CONTRACT_VERSION",
    "NO_REASON",
    "RESERVED_TEMPLATE_NAMES",
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
    "NamedToolChoice",
    "Problem",
    "PromptEcho",
    "Result",
    "Timings",
    "TokenLogprob",
    "ToolCall",
    "ToolCallDelta",
    "ToolCallMessage",
    "TopLogprob",
    "Usage",
    "WorkerInfo",
    "find_problems",
    "join_deltas",
    "merge_deltas",
    "parse_entry",
    "plain_chunk_to_wire",
    "rest_of_calls",
    "summarize",
    "tool_names",
]
