"""/v1/responses: OpenAI's Responses API. A response is a job; what is known of it later is what the job keeps."""

from http import HTTPStatus
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse

from producer.gateway.acceptance import accept
from producer.gateway.answer import answer
from producer.gateway.auth import Authenticated
from producer.gateway.context import Context
from producer.gateway.errors import ApiError, invalid_request
from producer.gateway.event_stream import EventStream
from producer.gateway.job_stream import JobStream
from producer.gateway.live_answer import respond
from producer.gateway.request_schemas import body_of
from producer.gateway.response_events import ResponseRenderer
from producer.gateway.routes.list_body import list_body
from producer.gateway.stored_responses import (
    check_has_events,
    delete_response,
    find_response,
    input_messages,
    show_response,
)
from producer.openai.responses.items import items_of
from producer.openai.responses.request import CALLERS_NAMES, RESPONSES_URL

router = APIRouter(tags=["responses"])

MAX_LIMIT = 100


@router.post(RESPONSES_URL, openapi_extra=body_of(RESPONSES_URL))
async def create_response(context: Context, caller: Authenticated, request: Request) -> Response:
    """The model's answer, whole or as a stream of server-sent events; with `background`, to be asked for later."""
    accepted = await accept(context, caller, request, RESPONSES_URL)
    if accepted.asked.is_streamed:
        return respond(context, accepted)
    if accepted.frame.asked.background:
        return JSONResponse(await show_response(context, accepted.frame), headers=accepted.headers)
    return await answer(context, accepted, request)


@router.get(
    RESPONSES_URL + "/{response_id}", response_model=None, responses={200: {"content": {"text/event-stream": {}}}}
)
async def get_response(
    context: Context,
    caller: Authenticated,
    response_id: str,
    stream: bool = False,
    starting_after: Annotated[int | None, Query(ge=0)] = None,
) -> dict[str, Any] | Response:
    """A response as it stands, or its events: from the first, or behind the one of a number. Leaving them does not
    cancel it."""
    if starting_after is not None and not stream:
        message = "starting_after: only with stream=true; leave it out"
        raise invalid_request(message, "starting_after")
    frame = await find_response(context, caller, response_id)
    if not stream:
        return await show_response(context, frame)
    if starting_after is not None:
        await check_has_events(context, frame.job_id)
    events = JobStream(
        context.client.job(frame.job_id),
        ResponseRenderer(frame, starting_after=starting_after, starts_at_once=True),
        None,
        callers_names=CALLERS_NAMES,
    )
    return EventStream([events], context)


@router.delete(RESPONSES_URL + "/{response_id}")
async def remove_response(context: Context, caller: Authenticated, response_id: str) -> dict[str, Any]:
    """Forget a response. One that has not ended is cancelled."""
    frame = await find_response(context, caller, response_id)
    await delete_response(context, frame.job_id)
    return {"id": response_id, "object": "response", "deleted": True}


@router.post(RESPONSES_URL + "/{response_id}/cancel")
async def cancel_response(context: Context, caller: Authenticated, response_id: str) -> dict[str, Any]:
    """End a response in the background; what it has said so far stays. One that has ended stays as it is."""
    frame = await find_response(context, caller, response_id)
    if not frame.asked.background:
        message = f"response {response_id} was not asked for with background: true; close its connection to cancel it"
        raise ApiError(HTTPStatus.BAD_REQUEST, "response_not_cancellable", message)
    await context.client.cancel(frame.job_id)
    return await show_response(context, frame)


@router.get(RESPONSES_URL + "/{response_id}/input_items")
async def list_input_items(
    context: Context,
    caller: Authenticated,
    response_id: str,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=MAX_LIMIT)] = 20,
    order: Literal["asc", "desc"] = "desc",
) -> dict[str, Any]:
    """What the response answers, earlier responses' items included. `after`: the last id of a page."""
    frame = await find_response(context, caller, response_id)
    items = list(items_of(input_messages(frame), frame.job_id))
    if order == "desc":
        items.reverse()
    ids = [item["id"] for item in items]
    if after is not None and after not in ids:
        message = f"after: no item {after[:100]} is among the response's; give the last id of a page"
        raise invalid_request(message, "after")
    begin = ids.index(after) + 1 if after is not None else 0
    return list_body(items[begin : begin + limit], has_more=begin + limit < len(items))
