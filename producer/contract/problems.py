"""A request that breaks the contract, said in words: which field, which rule, what was given.

Owns the wording of pydantic's errors for people. Knows nothing of where the request came from.
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError

from producer.contract.job import JobRequest
from producer.contract.message import CalledFunctionMessage, Message, TextPart, ToolCallMessage
from producer.contract.rules import CONTRACT_RULE
from producer.contract.tool import FunctionDefinition, FunctionTool, NamedToolChoice

MAX_SHOWN_CHARS = 60  # of the value that was given, or of a name that is none of ours
MAX_PROBLEMS = 10  # told of in one message


@dataclass(frozen=True, slots=True)
class Problem:
    """`param` is the field's path, such as `messages[0].role`; `message` names it and the rule."""

    param: str | None
    message: str


def find_problems(error: ValidationError) -> list[Problem]:
    """What is wrong with a `JobRequest`, one problem a field, in the order of the fields."""
    by_field: dict[Any, list[Any]] = {}
    for entry in error.errors(include_url=False):
        by_field.setdefault(_group(entry["loc"]), []).append(entry)
    return [_describe(entries) for entries in by_field.values()]


def summarize(error: ValidationError) -> Problem:
    """All problems in one: the first one's `param`, and every message."""
    problems = find_problems(error)
    told = "; ".join(problem.message for problem in problems[:MAX_PROBLEMS])
    more = len(problems) - MAX_PROBLEMS
    return Problem(problems[0].param, told if more <= 0 else f"{told}; and {more} more")


def rule_of(entry: Any) -> str:
    """The rule that one of pydantic's errors, of any model, is about."""
    template = _RULES.get(entry["type"])
    if template is None:
        return str(entry["msg"]).removeprefix("Value error, ")
    return template.format(**_plain_numbers(entry.get("ctx", {})))


def _group(loc: Sequence[Any]) -> tuple[Any, ...]:
    """Errors of one union (a prompt's two forms) belong together, and so does everything in one message or tool."""
    head = tuple(loc[:1])
    return head + tuple(loc[1:2]) if head in (("messages",), ("tools",)) and len(loc) > 1 else head


def _describe(entries: list[Any]) -> Problem:
    # A value that fits no form of a union fails once a form: what got furthest into a form says most, and of two that
    # got as far, a rule of ours.
    entry = max(entries, key=lambda candidate: (len(_path(candidate)), candidate["type"] == CONTRACT_RULE))
    if entry["type"] == CONTRACT_RULE:
        return _describe_rule(entry)
    param = _join(_path(entry))
    forms = {"string_type", "list_type"}
    if forms <= {other["type"] for other in entries if _path(other) == _path(entry)}:
        of_what = "token ids" if param.startswith(("prompt", "inputs")) else "text parts"
        return Problem(param, f"{param}: must be text or a list of {of_what}; got {_show(entry['input'])}")
    return Problem(param or None, f"{param or 'the job'}: {_rule(entry)}")


def _describe_rule(entry: Any) -> Problem:
    """A rule of ours names its field itself, unless it lies inside another one."""
    inner = (entry["ctx"]["param"],) if entry["ctx"]["param"] else ()
    param = _join(_path(entry) + inner)
    return Problem(param, f"{param}: {entry['msg']}" if _path(entry) else entry["msg"])


def _path(entry: Any) -> tuple[Any, ...]:
    """The error's location without pydantic's names for the forms of a union."""
    loc = entry["loc"]
    last = len(loc) - 1
    kept_last = entry["type"] in ("extra_forbidden", "missing")
    return tuple(
        part
        for at, part in enumerate(loc)
        if isinstance(part, int) or part in _FIELD_NAMES or (kept_last and at == last)
    )


def _join(path: Sequence[Any]) -> str:
    text = ""
    for part in path:
        name = part if isinstance(part, int) else cut(str(part), MAX_SHOWN_CHARS)
        text += f"[{name}]" if isinstance(part, int) else f".{name}" if text else str(name)
    return text


def _rule(entry: Any) -> str:
    if entry["type"] == "extra_forbidden":
        return "unknown field" + _suggest(entry)
    if entry["type"] == "missing":
        return "is required"
    if entry["type"] == "list_type" and tuple(entry["loc"]) == ("stop",):
        return f"must be text or a list of texts; got {_show(entry['input'])}"
    return f"{rule_of(entry)}; got {_show(entry['input'])}"


def _suggest(entry: Any) -> str:
    known = _INNER_FIELDS.get(entry["loc"][0]) if len(entry["loc"]) > 1 else JobRequest.model_fields
    close = difflib.get_close_matches(cut(str(entry["loc"][-1]), MAX_SHOWN_CHARS), known or (), n=2)
    return f"; did you mean {' or '.join(close)}?" if close else "; leave it out"


def _plain_numbers(context: dict[str, Any]) -> dict[str, Any]:
    return {name: f"{value:g}" if isinstance(value, float) else value for name, value in context.items()}


def _show(value: Any) -> str:
    return cut(repr(value), MAX_SHOWN_CHARS)


def cut(text: str, most: int) -> str:
    """So many characters of it at most."""
    return text if len(text) <= most else text[: most - 1] + "…"


def _fields_of(*models: type[BaseModel]) -> list[str]:
    return list(dict.fromkeys(name for model in models for name in model.model_fields))


_INNER_FIELDS = {
    "messages": _fields_of(Message, TextPart, ToolCallMessage, CalledFunctionMessage),
    "tools": _fields_of(FunctionTool, FunctionDefinition),
    "tool_choice": _fields_of(NamedToolChoice, FunctionDefinition),
}
_FIELD_NAMES = {*JobRequest.model_fields, *(name for names in _INNER_FIELDS.values() for name in names)}

_RULES = {
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "dict_type": "must be an object",
    "finite_number": "must be a finite number",
    "float_parsing": "must be a number",
    "float_type": "must be a number",
    "greater_than": "must be above {gt}",
    "greater_than_equal": "must be at least {ge}",
    "int_from_float": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_type": "must be a whole number",
    "less_than": "must be below {lt}",
    "less_than_equal": "must be at most {le}",
    "list_type": "must be a list",
    "literal_error": "must be {expected}",
    "model_type": "must be an object",
    "string_pattern_mismatch": "must match {pattern}",
    "string_too_long": "must have at most {max_length} characters",
    "string_too_short": "must not be empty",
    "string_type": "must be text",
    "string_unicode": "must be valid Unicode, without lone surrogates",
    "too_long": "must have at most {max_length} items",
    "too_short": "must have at least {min_length} items",
}
