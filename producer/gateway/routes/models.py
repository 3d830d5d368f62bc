"""GET /v1/models: what the live workers serve."""

from typing import Any

from fastapi import APIRouter

from producer.contract import WorkerInfo
from producer.gateway.catalog import not_found
from producer.gateway.context import Context

router = APIRouter(tags=["models"])


@router.get("/v1/models")
async def list_models(context: Context) -> dict[str, Any]:
    """The models that a live worker serves."""
    models = await context.catalog.models()
    return {"object": "list", "data": [_body(name, workers) for name, workers in models.items()]}


@router.get("/v1/models/{model:path}")
async def get_model(context: Context, model: str) -> dict[str, Any]:
    """One model; its name may hold slashes, plain or as %2F."""
    models = await context.catalog.models()
    if model not in models:
        raise not_found(model, list(models))
    return _body(model, models[model])


def _body(name: str, workers: list[WorkerInfo]) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": int(min(worker.started_at for worker in workers)),
        "owned_by": "promptmill",
        "context_length": min(worker.context_length for worker in workers),
    }
