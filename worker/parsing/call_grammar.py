"""A call that is forced, as a grammar for the engine: in the model's own format, with the tools' schemas.

The engine compiles it. What is written is what the parser reads.
"""

import json
from typing import Any

from engine.grammar_spec import JSON_STYLE, GrammarSpec
from producer.contract import JobRequest, NamedToolChoice
from worker.parsing.model_format import ModelFormat
from worker.parsing.output_plan import OutputPlan
from worker.parsing.reasoning_parser import CLOSES, OPENS

_LINE_BREAK = r'"\n"'
_WHITE_SPACE = r"/\n{0,2}/"
_NO_ARGUMENTS: dict[str, Any] = {"type": "object", "properties": {}}
_COMBINATORS = frozenset({"$ref", "allOf", "anyOf", "oneOf", "patternProperties", "unevaluatedProperties"})


def call_grammar(request: JobRequest, plan: OutputPlan, model_format: ModelFormat) -> GrammarSpec | None:
    """None: no call is forced. A named function is called once, `required` ones at least once."""
    tools, choice = request.callable_tools or [], request.tool_choice
    if isinstance(choice, NamedToolChoice):
        tools = [tool for tool in tools if tool["function"]["name"] == choice.function.name]
    elif choice != "required":
        return None
    rules = [_start(plan, model_format, repeats=choice == "required" and request.parallel_tool_calls)]
    if plan.has_reasoning:
        rules += _thought(plan, model_format)
    rules.append("call: " + " | ".join(f"call_{at}" for at in range(len(tools))))
    rules += [_call(at, tool["function"], model_format) for at, tool in enumerate(tools)]
    return GrammarSpec("lark", "\n".join(rules))


def _start(plan: OutputPlan, model_format: ModelFormat, *, repeats: bool) -> str:
    form = plan.tool_calls
    assert form is not None, "a call is forced only where it can be read"
    thought = "" if not plan.has_reasoning else "thought " if plan.begins_in_reasoning else "thought? "
    if form.closes is None:
        return f"start: {thought}call"  # such models were trained to make one call at a time
    opens, closes = _marker(form.opens, model_format), _marker(form.closes, model_format)
    call = f"{opens} {_LINE_BREAK} call {_LINE_BREAK} {closes}"
    return f"start: {thought}{call}" + (f" ({_LINE_BREAK} {call})*" if repeats else "")


def _thought(plan: OutputPlan, model_format: ModelFormat) -> list[str]:
    opens = "" if plan.begins_in_reasoning else f"{_marker(OPENS, model_format)} "
    if CLOSES in model_format.marker_tokens:  # which no text matches
        return [f"thought: {opens}/(?s:.*)/ {_marker(CLOSES, model_format)} {_WHITE_SPACE}"]
    return [f"thought: {opens}thinking {_WHITE_SPACE}", f"thinking[suffix={_text(CLOSES)}]: /(?s:.*)/"]


def _call(at: int, function: dict[str, Any], model_format: ModelFormat) -> str:
    assert model_format.tool_calls is not None
    head = f'{{"name": {json.dumps(function["name"])}, "{model_format.tool_calls.arguments_key}": '
    return f"call_{at}: {_text(head)} %json {json.dumps(_schema(function))} {_text('}')}"


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
