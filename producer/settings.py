"""Settings, read once at the edge: each is a command line flag and a PROMPTMILL_* variable, the flag winning."""

import re
import types
from collections.abc import Callable
from typing import Any, TypeVar, Union, get_args, get_origin

import click
from pydantic import Field, ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, SettingsConfigDict

from producer.contract.keys import DEFAULT_QUEUE
from producer.errors import SettingsError

ENV_PREFIX = "PROMPTMILL_"


class ProducerSettings(BaseSettings):
    """What every process that talks to the queues needs."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, frozen=True, extra="ignore")

    redis_url: str = Field(
        default="redis://localhost:6379",
        pattern=r"^(rediss?(\+sentinel)?|unix)://",
        description="Redis, as redis://, rediss:// or unix:// URL, or redis+sentinel://HOST,HOST/SERVICE.",
    )
    queue: str = Field(
        default=DEFAULT_QUEUE, pattern=r"^[A-Za-z0-9_.:@-]{1,128}$", description="Name of the queue that jobs go to."
    )
    s3_endpoint_url: str | None = Field(
        default=None,
        pattern=r"^https?://",
        description="Endpoint of the S3-compatible store that results lie in; none for AWS itself.",
    )


SettingsT = TypeVar("SettingsT", bound=BaseSettings)
Command = TypeVar("Command", bound=Callable[..., Any])


def load_settings(kind: type[SettingsT], flags: dict[str, Any] | None = None) -> SettingsT:
    """Settings from `flags` (None is "not given"), else the environment, else the default. Raises SettingsError."""
    given = {name: value for name, value in (flags or {}).items() if value is not None}
    try:
        return kind(**given)
    except ValidationError as error:
        raise SettingsError("; ".join(_explain(problem) for problem in error.errors())) from error


def settings_options(
    kind: type[BaseSettings], *, leave_out: frozenset[str] = frozenset()
) -> Callable[[Command], Command]:
    """Decorate a click command with one option for each field of `kind`; pass the values to `load_settings`."""

    def decorate(command: Command) -> Command:
        for name, info in reversed(kind.model_fields.items()):
            if name not in leave_out:
                command = _option(name, info)(command)
        return command

    return decorate


def _option(name: str, info: FieldInfo) -> Callable[[Command], Command]:
    flag = "--" + name.replace("_", "-")
    default = "" if info.default in (None, "") or info.is_required() else f"; default: {info.default}"
    help_text = f"{info.description or ''}  [{ENV_PREFIX}{name.upper()}{default}]"
    if _plain_type(info.annotation) is bool:
        return click.option(f"{flag}/--no-{flag[2:]}", name, default=None, help=help_text)
    return click.option(flag, name, default=None, metavar=name.rsplit("_", 1)[-1].upper(), help=help_text)


def _plain_type(annotation: Any) -> Any:
    """`X` of `X | None`."""
    if get_origin(annotation) in (Union, types.UnionType):
        return next((arg for arg in get_args(annotation) if arg is not type(None)), annotation)
    return annotation


def _explain(problem: Any) -> str:
    name = str(problem["loc"][0]) if problem["loc"] else "settings"
    flag = "--" + name.replace("_", "-")
    given = _PASSWORD.sub(r"\1***@", repr(problem["input"]))
    return f"{flag} ({ENV_PREFIX}{name.upper()}): {problem['msg']}; got {given}"


_PASSWORD = re.compile(r"(://[^:/@]*:)[^@]*@")
