"""/v1/webhook_endpoints: who is told of a batch's end. A key has endpoints of its own, which hear of its own batches.

An operator's endpoints hear of everybody's.
"""

from http import HTTPStatus
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query
from pydantic import BaseModel, ConfigDict, Field

from producer.gateway.auth import Authenticated, Caller
from producer.gateway.context import Context, GatewayContext
from producer.gateway.errors import ApiError, invalid_request
from producer.gateway.routes.list_body import list_body
from producer.gateway.webhooks.endpoints import (
    MAX_ENDPOINTS_A_KEY,
    WebhookEndpoint,
    add_endpoint,
    list_endpoints,
    read_endpoint,
    remove_endpoint,
    replace_endpoint,
)
from producer.gateway.webhooks.outbox import EVENT_TYPES, Event, EventType
from producer.gateway.webhooks.targets import TargetError

router = APIRouter(tags=["webhooks"])

_Name = Annotated[str, Field(min_length=1, max_length=100)]
_EventTypes = Annotated[list[EventType], Field(min_length=1, max_length=len(EVENT_TYPES))]


class _Body(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class EndpointCreate(_Body):
    name: _Name
    url: str
    event_types: _EventTypes


class EndpointUpdate(_Body):
    name: _Name | None = None
    url: str | None = None
    event_types: _EventTypes | None = None


class SecretRotation(_Body):
    keep_old_secret_active_for_24_hours: bool = False


class EndpointTest(_Body):
    event_type: EventType


async def _require_key(caller: Authenticated) -> Caller:
    """Raises ApiError (403): who has no key has nothing that others could not take over."""
    if caller.key is None and not caller.is_operator:
        message = "webhook endpoints need an API key: promptmill keys add NAME"
        raise ApiError(HTTPStatus.FORBIDDEN, "missing_api_key", message)
    return caller


Owner = Annotated[Caller, Depends(_require_key)]


@router.get("/v1/webhook_event_types")
async def list_event_types(caller: Authenticated) -> dict[str, Any]:
    return {"object": "list", "data": list(EVENT_TYPES)}


@router.post("/v1/webhook_endpoints")
async def create_endpoint(context: Context, caller: Owner, body: EndpointCreate) -> dict[str, Any]:
    """The signing secret is shown here, and never again."""
    await _check_url(context, body.url)
    key_id = None if caller.is_operator else caller.key_id
    own = [endpoint for endpoint in await context.redis.run(list_endpoints()) if endpoint.key_id == key_id]
    if len(own) >= MAX_ENDPOINTS_A_KEY:
        message = f"there are {len(own)} webhook endpoints, as many as a key may have; delete one first"
        raise ApiError(HTTPStatus.BAD_REQUEST, "too_many_webhook_endpoints", message)
    endpoint = WebhookEndpoint.create(
        name=body.name, url=body.url, key_id=key_id, event_types=tuple(dict.fromkeys(body.event_types))
    )
    await context.redis.run(add_endpoint(endpoint))
    return _shown(endpoint, with_secret=True)


@router.get("/v1/webhook_endpoints")
async def get_endpoints(
    context: Context, caller: Owner, after: str | None = None, limit: Annotated[int, Query(ge=1, le=100)] = 20
) -> dict[str, Any]:
    """The newest first."""
    found = [endpoint for endpoint in await context.redis.run(list_endpoints()) if caller.may_see(endpoint.key_id)]
    if after is not None:
        places = [place for place, endpoint in enumerate(found) if endpoint.id == after]
        if not places:
            message = f"after: there is no webhook endpoint {after[:80]!r}"
            raise invalid_request(message, "after")
        found = found[places[0] + 1 :]
    return list_body([_shown(endpoint) for endpoint in found[:limit]], has_more=len(found) > limit)


@router.get("/v1/webhook_endpoints/{endpoint_id}")
async def get_endpoint(context: Context, caller: Owner, endpoint_id: str) -> dict[str, Any]:
    return _shown(await _find(context, caller, endpoint_id))


@router.post("/v1/webhook_endpoints/{endpoint_id}")
async def update_endpoint(context: Context, caller: Owner, endpoint_id: str, body: EndpointUpdate) -> dict[str, Any]:
    """What is given replaces what was. One that was disabled by a 410 is called again."""
    fields = body.model_dump(exclude_none=True)
    if body.url is not None:
        await _check_url(context, body.url)
    old = await _find(context, caller, endpoint_id)
    return _shown(await _replace(context, old, old.changed(**fields)))


@router.delete("/v1/webhook_endpoints/{endpoint_id}")
async def delete_endpoint(context: Context, caller: Owner, endpoint_id: str) -> dict[str, Any]:
    endpoint = await _find(context, caller, endpoint_id)
    await context.redis.run(remove_endpoint(endpoint.id))
    return {"id": endpoint.id, "object": "webhook_endpoint.deleted", "deleted": True}


@router.post("/v1/webhook_endpoints/{endpoint_id}/rotate_secret")
async def rotate_secret(context: Context, caller: Owner, endpoint_id: str, body: SecretRotation) -> dict[str, Any]:
    """The new secret is shown here, and never again; the old one may sign beside it for a day."""
    old = await _find(context, caller, endpoint_id)
    new = old.rotated(keeps_old=body.keep_old_secret_active_for_24_hours)
    return _shown(await _replace(context, old, new), with_secret=True)


@router.post("/v1/webhook_endpoints/{endpoint_id}/test")
async def test_endpoint(context: Context, caller: Owner, endpoint_id: str, body: EndpointTest) -> dict[str, Any]:
    """Sends a sample now, once."""
    endpoint = await _find(context, caller, endpoint_id)
    sample = Event.sample(body.event_type)
    answer = await context.webhook_sender.send(
        endpoint.url, message_id=sample.id, body=sample.to_body(), secrets=endpoint.valid_secrets()
    )
    if answer.status is None:
        message = f"the endpoint could not be reached: {answer.problem}"
        raise ApiError(HTTPStatus.BAD_REQUEST, "webhook_endpoint_unreachable", message)
    return {
        "object": "webhook_endpoint.test",
        "webhook_endpoint_id": endpoint.id,
        "event_type": body.event_type,
        "status_code": answer.status,
        "success": True,
    }


async def _find(context: GatewayContext, caller: Caller, endpoint_id: str) -> WebhookEndpoint:
    """Raises ApiError (404), also for one of somebody else."""
    endpoint = await context.redis.run(read_endpoint(endpoint_id))
    if endpoint is None or not caller.may_see(endpoint.key_id):
        message = f"there is no webhook endpoint {endpoint_id[:80]!r}"
        raise ApiError(HTTPStatus.NOT_FOUND, "webhook_endpoint_not_found", message)
    return endpoint


async def _replace(context: GatewayContext, old: WebhookEndpoint, new: WebhookEndpoint) -> WebhookEndpoint:
    """Raises ApiError (409) if it changed under our hands."""
    if not await context.redis.run(replace_endpoint(old, new)):
        message = f"the webhook endpoint {old.id} was changed by somebody else at the same time; try again"
        raise ApiError(HTTPStatus.CONFLICT, "webhook_endpoint_changed", message)
    return new


async def _check_url(context: GatewayContext, url: str) -> None:
    """Raises ApiError (400)."""
    try:
        await context.webhook_targets.check(url)
    except TargetError as error:
        raise invalid_request(str(error), "url") from error


def _shown(endpoint: WebhookEndpoint, *, with_secret: bool = False) -> dict[str, Any]:
    body = {
        "object": "webhook_endpoint",
        "id": endpoint.id,
        "name": endpoint.name,
        "url": endpoint.url,
        "event_types": list(endpoint.event_types),
        "created_at": endpoint.created_at,
        "updated_at": endpoint.updated_at,
        "signing_secret_hint": f"whsec_…{endpoint.secret[-4:]}",
    }
    return {**body, "signing_secret": endpoint.secret} if with_secret else body
