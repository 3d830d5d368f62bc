"""POST /v1/completions."""

from fastapi import APIRouter, Request, Response

from producer.gateway.acceptance import accept
from producer.gateway.answer import answer
from producer.gateway.auth import Authenticated
from producer.gateway.context import Context
from producer.gateway.live_answer import respond
from producer.gateway.request_schemas import body_of
from producer.openai_request import COMPLETIONS_URL

router = APIRouter(tags=["completions"])


@router.post(COMPLETIONS_URL, openapi_extra=body_of(COMPLETIONS_URL))
async def create_completion(context: Context, caller: Authenticated, request: Request) -> Response:
    """What follows a prompt, whole or as a stream of server-sent events."""
    accepted = await accept(context, caller, request, COMPLETIONS_URL)
    return respond(context, accepted) if accepted.asked.is_streamed else await answer(context, accepted, request)
