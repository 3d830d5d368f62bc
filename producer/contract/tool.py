"""Functions that a chat may call, as OpenAI's API describes them, and the caller's choice among them."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, StrictBool, StrictStr

from producer.contract.rules import ContractModel, FirstFault, Text, breaks_rule, count_json_bytes

MAX_TOOLS = 128
MAX_TOOLS_BYTES = 256 << 10  # of all tools of a job, as JSON

FunctionName = Annotated[StrictStr, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]


class FunctionDefinition(ContractModel):
    name: FunctionName
    description: Text | None = None
    parameters: dict[str, Any] | None = Field(default=None, description="A JSON schema of an object.")
    strict: StrictBool | None = Field(
        default=None, description="Arguments match the schema; those of forced calls always do."
    )


class FunctionTool(ContractModel):
    type: Literal["function"]
    function: FunctionDefinition


def _check_tool(tool: dict[str, Any]) -> dict[str, Any]:
    """The tool as it was given: templates write it into the prompt, key by key, in the caller's order."""
    parameters = FunctionTool.model_validate(tool).function.parameters
    if parameters and parameters.get("type", "object") != "object":
        given = f"{parameters['type']!r:.40}"
        raise breaks_rule("function.parameters", f"must be the JSON schema of an object; its type is {given}")
    if parameters and not isinstance(parameters.get("properties", {}), dict):
        raise breaks_rule("function.parameters", "properties must be an object: a JSON schema for each name")
    return tool


def _check_tools(tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if not tools:
        raise breaks_rule("", "is empty; give at least one, or leave it out")
    names = tool_names(tools)
    for at, name in enumerate(names):
        if name in names[:at]:
            raise breaks_rule("", f"names must be unique; {name!r} is that of tools {names.index(name)} and {at}")
    num_bytes = count_json_bytes(tools)
    if num_bytes > MAX_TOOLS_BYTES:
        rule = f"must take at most {MAX_TOOLS_BYTES} bytes as JSON; got {num_bytes}: shorten the descriptions"
        raise breaks_rule("", rule)
    return tools


Tools = Annotated[
    list[Annotated[dict[str, Any], AfterValidator(_check_tool)]],
    FirstFault,
    Field(max_length=MAX_TOOLS),
    AfterValidator(_check_tools),
]
"""Validated `FunctionTool`s, kept as the dicts that they were given as."""


def tool_names(tools: Sequence[dict[str, Any]]) -> list[str]:
    return [tool["function"]["name"] for tool in tools]


class _ChosenFunction(ContractModel):
    name: FunctionName


class NamedToolChoice(ContractModel):
    """This function and no other, called once."""

    type: Literal["function"]
    function: _ChosenFunction


ToolChoice = Literal["none", "auto", "required"] | NamedToolChoice
"""`auto`: the model decides. `required`: at least one call. `none`: no call, and the model is shown no tools."""
