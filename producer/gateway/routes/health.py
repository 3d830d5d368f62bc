"""GET and HEAD /health: whether requests can be served, /health/ready: whether they are to be sent here, and
/health/live: whether this process answers."""

from http import HTTPStatus
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse

from producer.errors import RedisUnavailableError
from producer.gateway.context import Context, GatewayContext

router = APIRouter(tags=["health"])


@router.head("/health", include_in_schema=False)
@router.get("/health")
async def health(context: Context) -> JSONResponse:
    """200 while Redis is reachable, a worker alive and this process takes requests; else 503, saying which is not."""
    num_workers = await _count_workers(context)
    return _answer(context, num_workers, is_healthy=bool(num_workers))


@router.head("/health/ready", include_in_schema=False)
@router.get("/health/ready")
async def ready(context: Context) -> JSONResponse:
    """The same, but 200 also while no worker is alive: jobs, files and batches are read and taken without one. For load
    balancers: all gateways share the same workers."""
    num_workers = await _count_workers(context)
    return _answer(context, num_workers, is_healthy=num_workers is not None)


@router.head("/health/live", include_in_schema=False)
@router.get("/health/live")
async def live() -> dict[str, str]:
    """200 as long as this process answers, whatever becomes of Redis and the workers."""
    return {"status": "alive"}


async def _count_workers(context: GatewayContext) -> int | None:
    """None: Redis is away."""
    try:
        return len(await context.catalog.workers())
    except RedisUnavailableError:
        return None


def _answer(context: GatewayContext, num_workers: int | None, *, is_healthy: bool) -> JSONResponse:
    is_healthy = is_healthy and not context.drain.is_draining
    body: dict[str, Any] = {
        "status": "healthy" if is_healthy else "unavailable",
        "redis": "reachable" if num_workers is not None else "unreachable",
        "num_workers": num_workers or 0,
        "is_draining": context.drain.is_draining,
    }
    return JSONResponse(body, status_code=HTTPStatus.OK if is_healthy else HTTPStatus.SERVICE_UNAVAILABLE)
