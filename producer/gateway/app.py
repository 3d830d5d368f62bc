"""The ASGI application: routes, error format, CORS and middleware. Starts no server."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from producer.gateway.acceptance import JOB_ID_HEADER
from producer.gateway.context import GatewayContext
from producer.gateway.errors import install_handlers
from producer.gateway.files.form import MAX_FORM_BYTES
from producer.gateway.request_body import BodyLimit
from producer.gateway.request_context import RequestContext
from producer.gateway.routes import (
    batches,
    completions,
    console,
    embeddings,
    figures,
    files,
    health,
    jobs,
    models,
    page,
    responses,
    webhooks,
)

ROUTERS = (
    models.router,
    completions.router,
    responses.router,
    embeddings.router,
    jobs.router,
    batches.router,
    files.router,
    health.router,
    figures.router,
    webhooks.router,
)
CONSOLE_ROUTERS = (console.router, page.router)


def create_app(context: GatewayContext) -> ASGIApp:
    """The whole application; it starts and ends together with `context`."""
    settings = context.settings

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        context.start()
        yield
        await context.aclose()

    app = FastAPI(title="promptmill", version=version("promptmill"), lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.context = context
    install_handlers(app)
    for router in (*ROUTERS, *(CONSOLE_ROUTERS if settings.console else ())):
        app.include_router(router)
    if settings.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.allowed_origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after", JOB_ID_HEADER],
        )
    limits = {files.FILES_URL: BodyLimit(settings.max_file_bytes + MAX_FORM_BYTES, "--max-file-bytes")}
    return RequestContext(
        app,
        limit=BodyLimit(settings.max_body_bytes, "--max-body-bytes"),
        limits=limits,
        observe=context.metrics.observe_request,
    )
