"""How the outputs of one job are to be read: for calls, for thoughts, or not at all."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

from producer.contract import ErrorCode, JobRequest, tool_names
from worker.errors import JobRefusedError
from worker.parsing.model_format import ModelFormat
from worker.parsing.output_parser import OutputParser
from worker.parsing.reasoning_parser import OPENS, ReasoningParser
from worker.parsing.thought_tokens import ThoughtTokens
from worker.parsing.tool_call_parser import ToolCallFormat, ToolCallParser

_CALL_ID_BYTES = 12


@dataclass(frozen=True, slots=True)
class OutputPlan:
    """Of one job; its parsers are of one choice each."""

    tool_calls: ToolCallFormat | None
    tool_names: tuple[str, ...]
    max_calls: int | None
    is_forced: bool  # the output is calls, and nothing else
    has_reasoning: bool
    begins_in_reasoning: bool  # the prompt ends with the marker that opens a thought
    visible_token_ids: tuple[int, ...]
    token_bytes: Mapping[int, bytes] = field(repr=False, compare=False)

    @classmethod
    def of_chat(cls, request: JobRequest, prompt_end: str, model_format: ModelFormat) -> "OutputPlan | None":
        """None: the output is content, all of it. `prompt_end`: of the rendered chat.

        Raises JobRefusedError for tools whose calls could not be read.
        """
        tools = request.callable_tools
        if tools is not None:
            _check_format(request, model_format)
        # A form that the caller asked for is that of the whole output: there is no thought before it.
        has_reasoning = model_format.has_reasoning and request.output_format_field is None
        reads_calls = tools is not None and model_format.tool_calls is not None
        if not (has_reasoning or reads_calls):
            return None
        return cls(
            tool_calls=model_format.tool_calls if reads_calls else None,
            tool_names=tuple(tool_names(tools or [])),
            max_calls=None if request.parallel_tool_calls else 1,
            is_forced=request.forces_call,
            has_reasoning=has_reasoning,
            begins_in_reasoning=has_reasoning and prompt_end.rstrip().endswith(OPENS),
            visible_token_ids=tuple(model_format.marker_tokens.values()),
            token_bytes=model_format.token_bytes,
        )

    def build_parser(self, job_id: str, index: int) -> OutputParser:
        """For the choice `index`. Ids of calls are the same in every attempt."""
        calls = None
        if self.tool_calls is not None:
            calls = ToolCallParser(
                self.tool_calls,
                tool_names=self.tool_names,
                call_id=lambda number: _call_id(job_id, index, number),
                max_calls=self.max_calls,
                is_forced=self.is_forced,
            )
        reasoning = ReasoningParser(begins_inside=self.begins_in_reasoning) if self.has_reasoning else None
        return OutputParser(reasoning, calls, ThoughtTokens(self.token_bytes) if self.has_reasoning else None)


def _check_format(request: JobRequest, model_format: ModelFormat) -> None:
    calls = model_format.tool_calls
    if calls is None and model_format.tool_parser != "none":
        raise JobRefusedError(
            "this worker cannot tell how its model writes calls: leave tools out, or have the worker started with "
            "--tool-parser hermes or llama if the model writes them so, or with none to get calls as text",
            param="tools",
            code=ErrorCode.UNSUPPORTED,
        )
    if request.output_format_field is not None and (calls is None or calls.may_be_bare):
        raise JobRefusedError(
            "response_format cannot be held beside tools where a call begins as an answer may (--tool-parser llama or "
            "none): leave out either",
            param="response_format",
            code=ErrorCode.UNSUPPORTED,
        )
    if calls is not None:
        return
    if request.forces_call:
        raise JobRefusedError(
            "tool_choice cannot force a call where the worker was started with --tool-parser none: use 'auto'",
            param="tool_choice",
            code=ErrorCode.UNSUPPORTED,
        )
    if request.has_strict_tools:
        raise JobRefusedError(
            "strict cannot be held where the worker was started with --tool-parser none: leave it out of the tools",
            param="tools",
            code=ErrorCode.UNSUPPORTED,
        )


def _call_id(job_id: str, index: int, number: int) -> str:
    digest = hashlib.blake2b(f"{job_id}:{index}:{number}".encode(), digest_size=_CALL_ID_BYTES)
    return f"call_{digest.hexdigest()}"
