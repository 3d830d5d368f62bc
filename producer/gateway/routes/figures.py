"""GET /stats and GET /metrics: queues, workers and this process in figures, for people and for Prometheus."""

import dataclasses
from typing import Any

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST

from producer.errors import RedisUnavailableError
from producer.gateway.auth import Operator
from producer.gateway.context import Context

router = APIRouter(tags=["figures"])


@router.get("/stats")
async def stats(context: Context, caller: Operator) -> dict[str, Any]:
    """The queues with the numbers of their jobs, batches by status, webhooks that are not delivered, the workers with
    their scheduler's and memory's figures."""
    queues = await context.client.queues()
    return {
        "queues": [{**dataclasses.asdict(queue), "is_at_rest": queue.is_at_rest} for queue in queues],
        "batches": await context.batches.count_by_status(),
        "webhooks": dataclasses.asdict(await context.client.webhook_counts()),
        "workers": [worker.model_dump(mode="json") for worker in await context.catalog.workers()],
    }


@router.get("/metrics", response_class=Response)
async def metrics(context: Context, caller: Operator) -> Response:
    """Prometheus's text format. Without Redis the gateway's own figures alone."""
    try:
        queues, workers = await context.client.queues(), await context.catalog.workers()
        batches, webhooks = await context.batches.count_by_status(), await context.client.webhook_counts()
        text = context.metrics.render(queues, workers, batches, webhooks, is_redis_up=True)
    except RedisUnavailableError:
        text = context.metrics.render([], [], {}, None, is_redis_up=False)
    return Response(text, media_type=CONTENT_TYPE_LATEST)
