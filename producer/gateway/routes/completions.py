"""POST /v1/chat/completions and /v1/completions."""

from fastapi import APIRouter, Request, Response

from producer.gateway.acceptance import accept
from producer.gateway.answer import answer
from producer.gateway.auth import Authenticated, Caller
from producer.gateway.context import Context, GatewayContext
from producer.gateway.live_answer import respond
from producer.gateway.request_schemas import body_of
from producer.openai.request import CHAT_URL, COMPLETIONS_URL

router = APIRouter()


@router.post(CHAT_URL, tags=["chat"], openapi_extra=body_of(CHAT_URL))
async def create_chat_completion(context: Context, caller: Authenticated, request: Request) -> Response:
    """The model's next message, whole or as a stream of server-sent events."""
    return await _complete(context, caller, request, CHAT_URL)


@router.post(COMPLETIONS_URL, tags=["completions"], openapi_extra=body_of(COMPLETIONS_URL))
async def create_completion(context: Context, caller: Authenticated, request: Request) -> Response:
    """What follows a prompt, whole or as a stream of server-sent events."""
    return await _complete(context, caller, request, COMPLETIONS_URL)


async def _complete(context: GatewayContext, caller: Caller, request: Request, url: str) -> Response:
    accepted = await accept(context, caller, request, url)
    return respond(context, accepted) if accepted.asked.is_streamed else await answer(context, accepted, request)
