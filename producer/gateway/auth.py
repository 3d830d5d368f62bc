"""Who calls: an API key, or nobody in particular where that is allowed."""

from dataclasses import dataclass
from http import HTTPStatus
from typing import Annotated

from fastapi import Depends, Request

from producer.gateway.api_keys import ApiKey
from producer.gateway.context import Context
from producer.gateway.errors import ApiError


@dataclass(frozen=True, slots=True)
class Caller:
    """`key` is None for an anonymous one; `is_operator`: may see everybody's jobs and figures."""

    key: ApiKey | None
    is_operator: bool

    @property
    def key_id(self) -> str | None:
        return self.key.id if self.key is not None else None

    def may_see(self, key_id: str | None) -> bool:
        """Whether a job of that key is this caller's business."""
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
    # Clients send some key in any case: where none was ever made, any will do.
    if (settings.allow_anonymous or settings.is_loopback) and await context.keys.is_empty():
        return Caller(None, is_operator=True)
    message = "the API key is not valid, or was revoked" if text else "an API key is needed: Authorization: Bearer KEY"
    code = "invalid_api_key" if text else "missing_api_key"
    raise ApiError(HTTPStatus.UNAUTHORIZED, code, message, headers={"www-authenticate": "Bearer"})


Authenticated = Annotated[Caller, Depends(_authenticate)]


async def _require_operator(caller: Authenticated) -> Caller:
    """Raises ApiError (403)."""
    if not caller.is_operator:
        message = "this needs an operator's key: promptmill keys add NAME --operator"
        raise ApiError(HTTPStatus.FORBIDDEN, "operator_only", message)
    return caller


Operator = Annotated[Caller, Depends(_require_operator)]
