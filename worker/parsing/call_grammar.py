"""Calls as a grammar for the engine: in the model's own format, with the tools' schemas. What is written is what the
parser reads.

Three kinds: a call that `tool_choice` forces; calls that may come in place of an answer that has a form; and the calls
that a model makes of its own accord where a tool is `strict`, for which there is one rule: wherever a call is opened, a
valid one follows. The engine compiles it.
"""

import json
import re
from typing import Any

from engine.grammar_spec import JSON_STYLE, GrammarSpec
from producer.contract import JobRequest, NamedToolChoice
from worker.parsing.model_format import ModelFormat
from worker.parsing.output_plan import OutputPlan
from worker.parsing.reasoning_parser import CLOSES, OPENS
from worker.parsing.tool_call_parser import ToolCallFormat

_LINE_BREAK = r'"\n"'
_WHITE_SPACE = r"/\n{0,2}/"
_SPACES = r"[\s\x1c-\x1f]*"  # what Python strips as white space
_NO_ARGUMENTS: dict[str, Any] = {"type": "object", "properties": {}}
_COMBINATORS = frozenset({"$ref", "allOf", "anyOf", "oneOf", "patternProperties", "unevaluatedProperties"})


def call_grammar(request: JobRequest, plan: OutputPlan, model_format: ModelFormat) -> GrammarSpec | None:
    """None: no call is forced, none is strict, and the answer has no form.

    A named function is called once, `required` ones at least once. Arguments of a tool that is not strict are any
    object, where a call is not forced.
    """
    form = plan.tool_calls
    assert form is not None, "a call has a form only where it can be read"
    tools = request.callable_tools or []
    if isinstance(request.tool_choice, NamedToolChoice):
        tools = [tool for tool in tools if tool["function"]["name"] == request.tool_choice.function.name]
    has_form = request.output_format_field is not None
    if not (request.forces_call or request.has_strict_tools or has_form):
        return None
    write = _forced if request.forces_call else _formed if has_form else _free
    rules = write(request, plan, form, model_format)
    rules.append("call: " + " | ".join(f"call_{at}" for at in range(len(tools))))
    for at, tool in enumerate(tools):
        is_free = not (request.forces_call or tool["function"].get("strict"))
        rules.append(_call(at, tool["function"], form, is_free=is_free))
    return GrammarSpec("lark", "\n".join(rules))


def _forced(request: JobRequest, plan: OutputPlan, form: ToolCallFormat, model_format: ModelFormat) -> list[str]:
    """A thought, maybe, and then calls."""
    thought = "" if not plan.has_reasoning else "thought " if plan.begins_in_reasoning else "thought? "
    rules = _thought(plan, model_format) if plan.has_reasoning else []
    return [f"start: {thought}{_calls(request, form, model_format)}", *rules]


def _formed(request: JobRequest, plan: OutputPlan, form: ToolCallFormat, model_format: ModelFormat) -> list[str]:
    """The answer in its form, or calls: in tags, which no JSON begins with."""
    wanted = request.response_format or {}
    schema = wanted["json_schema"]["schema"] if wanted["type"] == "json_schema" else {"type": "object"}
    answer = f"answer: %json {json.dumps({'x-guidance': JSON_STYLE, **schema})}"
    return [f"start: answer | {_calls(request, form, model_format)}", answer]


def _calls(request: JobRequest, form: ToolCallFormat, model_format: ModelFormat) -> str:
    """Calls, and nothing else."""
    if form.closes is None:
        return "call"  # such models were trained to make one call at a time
    call = f"{_marker(form.opens, model_format)} {_in_tags(form.closes, model_format)}"
    repeats = request.parallel_tool_calls and not isinstance(request.tool_choice, NamedToolChoice)
    return call + (f" ({_LINE_BREAK} {call})*" if repeats else "")


def _free(request: JobRequest, plan: OutputPlan, form: ToolCallFormat, model_format: ModelFormat) -> list[str]:
    """Text, and calls wherever the model opens one. Thoughts are text here: a call that stands in one is valid, too."""
    thinks = [f"<[{model_format.marker_tokens[m]}]>" for m in (OPENS, CLOSES) if m in model_format.marker_tokens]
    before = f"(TEXT? ({' | '.join(thinks)}))* " if thinks else ""
    is_token = form.opens in model_format.marker_tokens
    opened = f"{before}TEXT? {_marker(form.opens, model_format)}" if is_token else f"{before}open"
    rules = [f"TEXT: {_text_regex(form, plan)}"]
    if not is_token:
        rules.append(f"open[lazy]: TEXT? {_text(form.opens)}")
    if form.closes is None:
        bare = f" | {before}TEXT? call" if form.may_be_bare else ""
        return [f"start: {before}TEXT? | {opened} call{bare}", *rules]
    call = f"{opened} {_in_tags(form.closes, model_format)}"
    return [f"start: ({call}){'*' if request.parallel_tool_calls else '?'} {before}TEXT?", *rules]


def _text_regex(form: ToolCallFormat, plan: OutputPlan) -> str:
    """Text that opens no call, spelt out or bare. Where a brace would open one, text ends."""
    regex = _without(form.opens)
    if form.may_be_bare:
        regex += rf" & ~/{_SPACES}\{{(?s:.*)/"
        if plan.has_reasoning:
            regex += rf" & ~/(?s:.*){_escape(CLOSES)}{_SPACES}\{{(?s:.*)/"
    return regex


def _without(marker: str) -> str:
    """At least one character, and the marker nowhere. What is a token is matched by no text, but can be spelt."""
    return rf"/(?s:.+)/ & ~/(?s:.*){_escape(marker)}(?s:.*)/"


def _escape(text: str) -> str:
    return re.escape(text).replace("/", r"\/")


def _thought(plan: OutputPlan, model_format: ModelFormat) -> list[str]:
    opens = "" if plan.begins_in_reasoning else f"{_marker(OPENS, model_format)} "
    if CLOSES in model_format.marker_tokens:
        thinking = f"THINKING? {_marker(CLOSES, model_format)}"
        return [f"thought: {opens}{thinking} {_WHITE_SPACE}", f"THINKING: {_without(CLOSES)}"]
    return [f"thought: {opens}thinking {_WHITE_SPACE}", f"thinking[suffix={_text(CLOSES)}]: /(?s:.*)/"]


def _in_tags(closes: str, model_format: ModelFormat) -> str:
    return f"{_LINE_BREAK} call {_LINE_BREAK} {_marker(closes, model_format)}"


def _call(at: int, function: dict[str, Any], form: ToolCallFormat, *, is_free: bool) -> str:
    head = f'{{"name": {json.dumps(function["name"])}, "{form.arguments_key}": '
    schema = {"x-guidance": JSON_STYLE, "type": "object"} if is_free else _schema(function)
    return f"call_{at}: {_text(head)} %json {json.dumps(schema)} {_text('}')}"


def _schema(function: dict[str, Any]) -> dict[str, Any]:
    """Of the arguments. What was not declared is not made up, unless the schema says how."""
    parameters = function.get("parameters") or _NO_ARGUMENTS
    is_plain = "properties" in parameters and not _COMBINATORS & parameters.keys()
    closed = {"additionalProperties": False} if is_plain else {}
    return {"x-guidance": JSON_STYLE, "type": "object", **closed, **parameters}


def _marker(marker: str, model_format: ModelFormat) -> str:
    """By its id where it is a token: llguidance takes added tokens in brackets for special ones, whatever they are."""
    token_id = model_format.marker_tokens.get(marker)
    return _text(marker) if token_id is None else f"<[{token_id}]>"


def _text(text: str) -> str:
    return json.dumps(text)
