"""GET /v1/models: what the live workers serve."""

from typing import Any

from fastapi import APIRouter

from producer.contract import WorkerInfo
from producer.gateway.auth import Authenticated, Caller
from producer.gateway.catalog import not_found
from producer.gateway.context import Context, GatewayContext

router = APIRouter(tags=["models"])


@router.get("/v1/models")
async def list_models(context: Context, caller: Authenticated) -> dict[str, Any]:
    """The models that a live worker serves and the key may use."""
    models = await _usable_models(context, caller)
    return {"object": "list", "data": [_body(name, workers) for name, workers in models.items()]}


@router.get("/v1/models/{model:path}")
async def get_model(context: Context, caller: Authenticated, model: str) -> dict[str, Any]:
    """One model; its name may hold slashes, plain or as %2F."""
    models = await _usable_models(context, caller)
    if model not in models:
        raise not_found(model, list(models))
    return _body(model, models[model])


async def _usable_models(context: GatewayContext, caller: Caller) -> dict[str, list[WorkerInfo]]:
    models = await context.catalog.models()
    return {name: workers for name, workers in models.items() if caller.may_use(name)}


def _body(name: str, workers: list[WorkerInfo]) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": int(min(worker.started_at for worker in workers)),
        "owned_by": "promptmill",
        "context_length": min(worker.context_length for worker in workers),
    }
