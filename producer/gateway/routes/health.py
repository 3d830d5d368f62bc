"""GET /health: whether requests can be served, and GET /health/live: whether this process answers."""

from http import HTTPStatus
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse

from producer.errors import RedisUnavailableError
from producer.gateway.context import Context

router = APIRouter(tags=["health"])


@router.get("/health")
async def health(context: Context) -> JSONResponse:
    """200 while Redis is reachable, a worker alive and this process takes requests; else 503, saying which is not."""
    try:
        num_workers = len(await context.catalog.workers())
        redis = "reachable"
    except RedisUnavailableError:
        num_workers, redis = 0, "unreachable"
    is_ready = num_workers > 0 and not context.drain.is_draining
    body: dict[str, Any] = {
        "status": "healthy" if is_ready else "unavailable",
        "redis": redis,
        "num_workers": num_workers,
        "is_draining": context.drain.is_draining,
    }
    return JSONResponse(body, status_code=HTTPStatus.OK if is_ready else HTTPStatus.SERVICE_UNAVAILABLE)


@router.get("/health/live")
async def live() -> dict[str, str]:
    """200 as long as this process answers, whatever becomes of Redis and the workers."""
    return {"status": "alive"}
