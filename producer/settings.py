"""Settings, read once at the edge: each is a command line flag and a PROMPTMILL_* variable, the flag winning."""

import logging
import os
import re
import types
from collections.abc import Callable
from difflib import get_close_matches
from typing import Any, Literal, TypeVar, Union, get_args, get_origin
from urllib.parse import urlsplit

import click
import redis
from pydantic import Field, ValidationError, ValidationInfo, field_validator
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, SettingsConfigDict

from producer.contract.keys import DEFAULT_QUEUE, QUEUE_PATTERN
from producer.contract.problems import rule_of
from producer.contract.sentinel_url import SentinelUrl
from producer.errors import SettingsError

ENV_PREFIX = "PROMPTMILL_"
_log = logging.getLogger(__name__)
_MISSPELT = 0.85  # two names more alike than this are one, typed twice
_SEEN_ELSEWHERE = {"QUEUES"}  # settings of other commands that look like one of theirs: an environment may be shared
_UNITS = ("BYTES", "PORT")
S3_URL_PATTERN = r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/.*)?"
REDIS_SCHEMES = ("redis://", "rediss://", "unix://", "redis+sentinel://", "rediss+sentinel://")


class ProducerSettings(BaseSettings):
    """What every process that talks to the queues needs."""

    # Empty variables are how compose files and charts say that nothing is set.
    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, frozen=True, extra="ignore", env_ignore_empty=True)

    redis_url: str = Field(
        default="redis://localhost:6379",
        description="URL of Redis: redis://, rediss:// or unix://, or redis+sentinel://HOST,HOST/SERVICE.",
    )
    queue: str = Field(
        default=DEFAULT_QUEUE, pattern=f"^{QUEUE_PATTERN}$", description="Queue that jobs are put on and taken from."
    )
    s3_endpoint_url: str | None = Field(
        default=None,
        pattern=r"^https?://",
        description="Endpoint of the S3-compatible store that holds results; leave it out for AWS.",
    )

    @field_validator("*", mode="before")
    @classmethod
    def _choices_have_any_case(cls, value: Any, info: ValidationInfo) -> Any:
        """As LOG_LEVEL=INFO is written elsewhere."""
        annotation = cls.model_fields[str(info.field_name)].annotation
        if get_origin(annotation) is Literal and isinstance(value, str) and value.lower() in get_args(annotation):
            return value.lower()
        return value

    @field_validator("redis_url")
    @classmethod
    def _redis_url_is_whole(cls, value: str) -> str:
        """redis-py would stumble over some of it when it connects, and read the rest as something else, in silence."""
        if not value.startswith(REDIS_SCHEMES):
            raise ValueError(f"must begin with {', '.join(REDIS_SCHEMES)}")
        if SentinelUrl.parse(value) is not None:
            return value
        parts = urlsplit(value)
        if "#" in value or (parts.scheme != "unix" and not re.fullmatch(r"/?[0-9]*", parts.path)):
            raise ValueError(
                "after the host only a database number may follow (/0); in a password write # as %23, / as %2F"
            )
        if parts.scheme == "unix" and not parts.path:
            raise ValueError("must name the socket, as unix:///PATH")
        try:
            redis.ConnectionPool.from_url(value).make_connection()  # opens none
        except (TypeError, redis.RedisError) as error:
            raise ValueError(f"has an option that is not supported ({error})") from None
        return value


class ServerSettings(ProducerSettings):
    """What workers and gateways need as well: how they log."""

    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="Log level: debug, info, warning or error."
    )
    log_format: Literal["text", "json"] = Field(
        default="text", description="Log format: text or json, one event per line."
    )


SettingsT = TypeVar("SettingsT", bound=BaseSettings)
Command = TypeVar("Command", bound=Callable[..., Any])


def load_settings(kind: type[SettingsT], flags: dict[str, Any] | None = None) -> SettingsT:
    """Settings from `flags` (None is "not given"), else the environment, else the default. Raises SettingsError."""
    given = {name: value for name, value in (flags or {}).items() if value is not None}
    try:
        return kind(**given)
    except ValidationError as error:
        raise SettingsError("; ".join(_explain(problem, kind) for problem in error.errors())) from error


def warn_of_misspelt_variables(kind: type[BaseSettings]) -> None:
    """Log which PROMPTMILL_* variables are no setting and look like one: pydantic passes them over in silence."""
    names = [name.upper() for name in kind.model_fields]
    for variable in os.environ:
        name = variable.upper().removeprefix(ENV_PREFIX)
        if not variable.upper().startswith(ENV_PREFIX) or name in names or name in _SEEN_ELSEWHERE:
            continue
        for meant in get_close_matches(name, names, n=1, cutoff=_MISSPELT):
            reason = f"{variable} is not a setting here; did you mean {ENV_PREFIX}{meant}?"
            _log.warning("action=variable_ignored reason=%r", reason)


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


def split_list(text: str | None) -> list[str]:
    """The items of a setting that is comma separated."""
    return [item for part in (text or "").split(",") if (item := part.strip())]


def _option(name: str, info: FieldInfo) -> Callable[[Command], Command]:
    flag = "--" + name.replace("_", "-")
    default = "" if info.default in (None, "") or info.is_required() else f"; default: {info.default}"
    help_text = f"{info.description or ''}  [{ENV_PREFIX}{name.upper()}{default}]"
    kind = _plain_type(info.annotation)
    if kind is bool:
        return click.option(f"{flag}/--no-{flag[2:]}", name, default=None, help=help_text)
    return click.option(flag, name, default=None, metavar=_metavar(name, kind), help=help_text)


def _metavar(name: str, kind: Any) -> str:
    """What stands for the value: the unit or the thing that ends the name; N for a number of something else."""
    last = name.rsplit("_", 1)[-1].upper()
    return "N" if kind is int and last not in _UNITS else last


def _plain_type(annotation: Any) -> Any:
    """`X` of `X | None`."""
    if get_origin(annotation) in (Union, types.UnionType):
        return next((arg for arg in get_args(annotation) if arg is not type(None)), annotation)
    return annotation


def redact_url(url: str) -> str:
    """The URL without its password: that may hold an @ that nobody has escaped, stand where the user's name belongs,
    or be an option."""
    for secret in _SECRETS:
        url = secret.sub(r"\1***", url)
    return url


_SECRETS = (
    re.compile(r"(://[^:/@]*:).*(?=@)"),
    re.compile(r"(://)[^:/@?]+(?=@)"),
    re.compile(r"([?&][^=&]*(?:pas|pw|secret)[^=&]*=)[^&#']*", re.IGNORECASE),  # misspelt ones as well
)


def _explain(problem: Any, kind: type[BaseSettings]) -> str:
    name = str(problem["loc"][0]) if problem["loc"] else "settings"
    flag = "--" + name.replace("_", "-")
    rule = rule_of(problem)
    if problem["type"] == "string_pattern_mismatch":  # a pattern alone says little to who does not read them
        description = (kind.model_fields[name].description or "").rstrip(".")
        rule = f"must match {problem['ctx']['pattern']} ({description})"
    return f"{flag} ({ENV_PREFIX}{name.upper()}): {rule}; got {redact_url(repr(problem['input']))}"
