"""POST /v1/embeddings."""

from fastapi import APIRouter, Request, Response

from producer.gateway.acceptance import accept
from producer.gateway.answer import answer
from producer.gateway.auth import Authenticated
from producer.gateway.context import Context
from producer.gateway.request_schemas import body_of
from producer.openai.embeddings import EMBEDDINGS_URL

router = APIRouter(tags=["embeddings"])


@router.post(EMBEDDINGS_URL, openapi_extra=body_of(EMBEDDINGS_URL))
async def create_embeddings(context: Context, caller: Authenticated, request: Request) -> Response:
    """The embedding of a text, or that of each of a list."""
    return await answer(context, await accept(context, caller, request, EMBEDDINGS_URL), request)
