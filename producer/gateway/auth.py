"""Who calls: an API key, or nobody in particular where that is allowed."""

import ipaddress
from dataclasses import dataclass
from http import HTTPStatus
from typing import Annotated
from urllib.parse import urlsplit

from fastapi import Depends, Request

from producer.gateway.api_keys import ApiKey
from producer.gateway.context import Context
from producer.gateway.errors import ApiError
from producer.gateway.settings import GatewaySettings

LOCAL_DOMAINS = (".localhost", ".local", ".internal", ".home.arpa")


@dataclass(frozen=True, slots=True)
class Caller:
    """`key` is None for an anonymous caller. `is_operator`: may see everybody's jobs, and the metrics."""

    key: ApiKey | None
    is_operator: bool

    @property
    def key_id(self) -> str | None:
        return self.key.id if self.key is not None else None

    def may_see(self, key_id: str | None) -> bool:
        """Whether the caller may see what belongs to that key."""
        return self.is_operator or key_id == self.key_id

    def may_use(self, model: str) -> bool:
        return self.key is None or self.key.allows(model)


async def _authenticate(request: Request, context: Context) -> Caller:
    """Raises ApiError (401)."""
    scheme, _, text = request.headers.get("authorization", "").partition(" ")
    key = await context.keys.find(text.strip()) if scheme.lower() == "bearer" else None
    if key is not None:
        request.state.key_id = key.id
        return Caller(key, key.is_operator)
    settings = context.settings
    if settings.allow_anonymous and not text:
        return Caller(None, is_operator=await context.keys.is_empty())
    # OpenAI's clients always send a key. While no key exists, any is accepted.
    if (settings.allow_anonymous or settings.is_loopback) and await context.keys.is_empty():
        if not settings.allow_anonymous:
            _refuse_websites(request, settings)
        return Caller(None, is_operator=True)
    message = "the API key is not valid, or was revoked" if text else "an API key is needed: Authorization: Bearer KEY"
    code = "invalid_api_key" if text else "missing_api_key"
    raise ApiError(HTTPStatus.UNAUTHORIZED, code, message, headers={"www-authenticate": "Bearer"})


def _refuse_websites(request: Request, settings: GatewaySettings) -> None:
    """On loopback no key is needed. But a website can reach us through its visitor's browser, with a name that it makes
    resolve to this machine or with a form that it posts. Raises ApiError (403)."""
    if not _is_local(f"//{request.headers.get('host', 'localhost')}"):
        message = "without a key this gateway is for localhost; make a key (promptmill keys add), or --allow-anonymous"
        raise ApiError(HTTPStatus.FORBIDDEN, "foreign_host", message)
    origin = request.headers.get("origin")
    if origin is not None and not _is_local(origin) and {origin, "*"}.isdisjoint(settings.allowed_origins):
        message = f"without a key no other site's page is served; got {origin[:60]!r}: make a key, or --cors-origins"
        raise ApiError(HTTPStatus.FORBIDDEN, "foreign_origin", message)


def _is_local(url: str) -> bool:
    """Whether no website can have this host: an address, a name without a dot, or a name reserved for local
    networks."""
    try:
        host = urlsplit(url).hostname or ""
    except ValueError:
        return False
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return bool(host) and ("." not in host or host.endswith(LOCAL_DOMAINS))
    return True


Authenticated = Annotated[Caller, Depends(_authenticate)]


async def _require_operator(caller: Authenticated) -> Caller:
    """Raises ApiError (403)."""
    if not caller.is_operator:
        message = "this needs an operator's key: promptmill keys add NAME --operator"
        raise ApiError(HTTPStatus.FORBIDDEN, "operator_only", message)
    return caller


Operator = Annotated[Caller, Depends(_require_operator)]
