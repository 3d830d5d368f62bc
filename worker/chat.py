"""Messages to the text a model was trained on, through the model's own chat template.

The environment is the one that templates are written for (transformers' `apply_chat_template`), without transformers:
a sandbox, because a template comes with the model and is not trusted. Knows nothing of tokens.
"""

import json
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from producer.contract import ErrorCode, Message
from worker.errors import JobRefusedError


class ChatRenderer:
    """Renders chats with one template, compiled once. Thread-safe."""

    def __init__(
        self, template: str | None, *, bos_token: str | None = None, eos_token: str | None = None, model: str = ""
    ) -> None:
        self._model = model
        self._special_tokens = {
            name: token for name, token in (("bos_token", bos_token), ("eos_token", eos_token)) if token is not None
        }
        self._knows_developer = template is not None and "developer" in template
        self._refusal: str | None = None
        try:
            self._template = _environment().from_string(template or "")
        except TemplateError as error:
            self._refuse_all(f"the chat template of model {model!r} is damaged ({error})")
        if template is None:
            self._refuse_all(f"model {model!r} has no chat template")

    def render(self, messages: list[Message], *, add_generation_prompt: bool = True) -> str:
        """The prompt text, special tokens included: encode it without adding them again.

        Raises JobRefusedError(param="messages") if the model has no template or its template refuses the messages.
        """
        if self._refusal is not None:
            raise JobRefusedError(ErrorCode.INVALID_REQUEST, self._refusal, param="messages")
        try:
            return self._template.render(
                messages=[self._plain(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            )
        except Exception as error:  # a template is foreign code: whatever it raises is about these messages
            raise JobRefusedError(
                ErrorCode.INVALID_REQUEST,
                f"the chat template of model {self._model!r} refuses the messages: {error}",
                param="messages",
            ) from error

    def _refuse_all(self, reason: str) -> None:
        self._refusal = f"{reason}: send a prompt instead of messages, or serve an instruction-tuned model"

    def _plain(self, message: Message) -> dict[str, Any]:
        """What templates expect: plain values, text parts joined. Few know OpenAI's name for the system role."""
        plain = message.model_dump(exclude_none=True)
        if message.content is not None:
            plain["content"] = message.text
        if message.role == "developer" and not self._knows_developer:
            plain["role"] = "system"
        return plain


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
