"""Messages to the text a model was trained on, through the model's own chat template.

The environment is the one that templates are written for (transformers' `apply_chat_template`), without transformers:
a sandbox, because a template comes with the model and is not trusted. Knows nothing of tokens.
"""

import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.meta import find_undeclared_variables
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from producer.contract import ErrorCode, Message, ToolCallMessage
from worker.errors import JobRefusedError, StartRefusedError


class ChatRenderer:
    """Renders chats with a model's templates, compiled once. Thread-safe."""

    def __init__(
        self,
        template: str | None,
        *,
        tool_template: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
        model: str = "",
    ) -> None:
        """`tool_template` is for chats with tools, where a model has one of its own for them."""
        self._model = model
        self._special_tokens = dict(special_tokens or {})
        self._refusal: str | None = None
        if template is None:
            self._refuse_all(f"model {model!r} has no chat template")
        try:
            self._plain_chats = _ChatTemplate(template or "")
            self._tool_chats = _ChatTemplate(tool_template) if tool_template is not None else self._plain_chats
        except TemplateError as error:
            self._refuse_all(f"the chat template of model {model!r} is damaged ({error})")

    def render(
        self,
        messages: list[Message],
        *,
        tools: list[dict[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt text, special tokens included: encode it without adding them again.

        Raises JobRefusedError: with param `messages` if the model has no template or its template refuses them, with
        param `tools` if it has no place for tools.
        """
        if self._refusal is not None:
            raise JobRefusedError(self._refusal, param="messages")
        template = self._tool_chats if tools else self._plain_chats
        if tools and not template.knows_tools:
            raise JobRefusedError(
                f"model {self._model!r} takes no tools, its chat template has no place for them: leave tools out, "
                "serve a model that was trained to call them, or give its worker one that has it (--chat-template)",
                param="tools",
                code=ErrorCode.UNSUPPORTED,
            )
        if not template.knows_calls and any(message.content is None for message in messages):
            raise JobRefusedError(
                f"the chat template of model {self._model!r} has no place for tool calls: leave messages with "
                "tool_calls out, or give them content",
                param="messages",
                code=ErrorCode.UNSUPPORTED,
            )
        given = {
            **self._special_tokens,
            **(template_kwargs or {}),
            "messages": [template.plain(message) for message in messages],
            "tools": [_plain_tool(tool) for tool in tools] if tools else None,
            "documents": None,
            "add_generation_prompt": True,
        }
        try:
            return template.render(given)
        except Exception as error:  # a template is foreign code: whatever it raises is about these messages
            raise JobRefusedError(
                f"the chat template of model {self._model!r} refuses the messages: {error}",
                param="messages",
            ) from error

    def _refuse_all(self, reason: str) -> None:
        self._refusal = f"{reason}: send a prompt instead of messages, or serve an instruction-tuned model"


def read_template(path: str) -> str:
    """Raises StartRefusedError naming the setting."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise StartRefusedError(
            f"--chat-template: {path} cannot be read ({error}): name a file with a template"
        ) from error


class _ChatTemplate:
    """One template, and what can be said of it without rendering it."""

    def __init__(self, source: str) -> None:
        environment = _environment()
        self._template = environment.from_string(source)
        self._knows_developer = "developer" in source
        self.knows_calls = "tool_calls" in source
        self.knows_tools = "tools" in find_undeclared_variables(environment.parse(source))

    def render(self, given: Mapping[str, Any]) -> str:
        return self._template.render(given)

    def plain(self, message: Message) -> dict[str, Any]:
        """What templates expect: plain values, text parts joined, arguments as objects, and content with every message.

        Few know OpenAI's name for the system role. Thoughts go by several names; transformers gives them all, too.
        """
        plain: dict[str, Any] = {
            "role": "system" if message.role == "developer" and not self._knows_developer else message.role,
            "content": None if message.content is None else message.text,
        }
        plain |= message.model_dump(exclude={"role", "content", "tool_calls", "reasoning"}, exclude_none=True)
        if message.reasoning is not None:
            plain |= dict.fromkeys(("reasoning", "reasoning_content", "thinking"), message.reasoning)
        if message.tool_calls:
            plain["tool_calls"] = [_plain_call(call) for call in message.tool_calls]
        return plain


def _plain_tool(tool: dict[str, Any]) -> dict[str, Any]:
    """One without parameters takes none; templates look for them all the same."""
    function = tool["function"]
    parameters = function.get("parameters") or {}
    needed: dict[str, Any] = {"type": "object", "properties": {}}
    missing = {name: value for name, value in needed.items() if name not in parameters}
    return {**tool, "function": {**function, "parameters": {**parameters, **missing}}} if missing else tool


def _plain_call(call: ToolCallMessage) -> dict[str, Any]:
    function = {"name": call.function.name, "arguments": call.function.parsed_arguments}
    plain = {"type": call.type, "function": function}
    return plain if call.id is None else {"id": call.id, **plain}


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(
        raise_exception=_raise_exception, strftime_now=_strftime_now, dict=_TemplateDict(), namespace=_TemplateNamespace
    )
    return environment


class _GenerationBlocks(Extension):
    """`{% generation %}…{% endgeneration %}` marks what the assistant said, for training; here it is its content."""

    tags = {"generation"}  # noqa: RUF012  (jinja2's own declaration)

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        # The mark opens a scope of its own, as a block that is called does.
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _TemplateDict:
    """`dict` for templates, without the attributes of the type."""

    def __call__(self, *args: Any, **values: Any) -> dict[Any, Any]:
        return dict(*args, **values)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _TemplateNamespace(Namespace):
    """`namespace` for templates, without underscore names, which could reach the interpreter."""

    def __init__(*args: Any, **values: Any) -> None:  # no named self: `namespace(self=…)` is allowed
        self, *rest = args
        given = dict(*rest, **values)
        for name in given:
            _check_name(name)
        Namespace.__init__(self, given)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace takes no underscore name; got {name!r}")


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: jinja2's own filter escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(layout: str) -> str:
    return datetime.now().strftime(layout)
