"""Items of earlier responses that a request's input names (`item_reference`) instead of giving them.

An item's id says which job's output it is of, so that nothing is kept beside what `stored_responses` reads.
"""

import asyncio
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from producer.contract import keys
from producer.errors import JobNotFoundError
from producer.gateway.auth import Caller
from producer.gateway.context import GatewayContext
from producer.gateway.errors import ApiError
from producer.gateway.stored_responses import find_record, outcome
from producer.openai.responses.body import RESPONSE_PREFIX
from producer.openai.responses.output import ResponseOutput

MAX_READS = 16  # of responses, at once

_ITEM_ID = re.compile(r"(?P<kind>msg|rs|fc)_(?P<job_id>[0-9a-z-]+)(?:_[0-9]+)?")
_NOTHING = {"type": "reasoning", "summary": []}  # for an item that is included already: the others keep their places

Item = dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Reference:
    at: int  # in the input
    item_id: str
    kind: str
    job_id: str

    @classmethod
    def read(cls, at: int, item_id: str) -> "_Reference":
        """Raises ApiError."""
        match = _ITEM_ID.fullmatch(item_id)
        if match is None:
            raise _not_found(at, item_id)
        return cls(at, item_id, match["kind"], match["job_id"])

    def find(self, output: Mapping[str, Item]) -> Item:
        """A stream numbers the pieces of a text among calls; what is kept has the text in one. Raises ApiError."""
        item = output.get(self.item_id) or output.get(f"{self.kind}_{self.job_id}")
        if item is None:
            raise _not_found(self.at, self.item_id)
        return item


async def give_items(
    context: GatewayContext, caller: Caller, body: dict[str, Any], named: Mapping[int, str], num_bytes: int
) -> tuple[dict[str, Any], int]:
    """The body, whose size is `num_bytes`, with the items that its input names in their places, and its new size. No
    item is included twice: neither one that is named again nor one of a response that the body continues. Raises
    ApiError."""
    continued = await _continued(context, caller, body.get("previous_response_id"))
    references: dict[str, list[_Reference]] = {}
    for reference in (_Reference.read(at, item_id) for at, item_id in named.items()):
        if RESPONSE_PREFIX + reference.job_id not in continued:
            references.setdefault(reference.job_id, []).append(reference)
    items: list[Any] = [_NOTHING if at in named else item for at, item in enumerate(body["input"])]
    given: set[str] = set()
    unread = list(references.values())
    while unread:
        some, unread = unread[:MAX_READS], unread[MAX_READS:]
        outputs = await asyncio.gather(*(_read_output(context, caller, same[0]) for same in some))
        for same, output in zip(some, outputs, strict=True):
            for reference in same:
                item = reference.find(output)
                if item["id"] not in given:
                    given.add(item["id"])
                    items[reference.at] = item
                    num_bytes += len(json.dumps(item))
        _check_size(num_bytes, context.settings.max_body_bytes)
    return {**body, "input": items}, num_bytes


async def _continued(context: GatewayContext, caller: Caller, response_id: Any) -> set[str]:
    """The ids of all responses that the body continues. A missing one is reported later."""
    record = None
    if isinstance(response_id, str):
        record = await find_record(context, caller, response_id.removeprefix(RESPONSE_PREFIX))
    return (
        {record.response_id, *record.response.earlier} if record is not None and record.response is not None else set()
    )


async def _read_output(context: GatewayContext, caller: Caller, reference: _Reference) -> dict[str, Item]:
    """The items of the response's output, by their ids. Raises ApiError."""
    at, item_id, job_id = reference.at, reference.item_id, reference.job_id
    if await find_record(context, caller, job_id) is None:
        raise _not_found(at, item_id)
    try:
        status = await context.client.status(job_id)
        if not status.has_ended:
            rule = f"the response of {item_id:.100} has not ended; wait for it, or cancel it"
            raise _fault(HTTPStatus.BAD_REQUEST, "item_not_finished", at, rule)
        result = await outcome(context, job_id)
    except JobNotFoundError as error:
        raise _not_found(at, item_id) from error
    if not result.choices:
        return {}
    choice = result.choices[0].model_copy(update={"logprobs": None})  # an input has no use for them
    return {item["id"]: item for item in ResponseOutput.of_choice(job_id, choice).items}


def _check_size(num_bytes: int, max_bytes: int) -> None:
    if num_bytes > max_bytes:
        message = f"input: is larger than {max_bytes} bytes with the items that it names; send less, or raise "
        status, flag = HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "--max-body-bytes"
        raise ApiError(status, "request_too_large", message + flag, param="input")


def _not_found(at: int, item_id: str) -> ApiError:
    hours = keys.RESULT_TTL_SECONDS // 3600
    rule = f"{item_id:.100} is not an item of a known response; responses are kept for {hours} h after their end"
    return _fault(HTTPStatus.NOT_FOUND, "item_not_found", at, f"{rule}, with store: true; send the item itself")


def _fault(status: HTTPStatus, code: str, at: int, rule: str) -> ApiError:
    param = f"input[{at}].id"
    return ApiError(status, code, f"{param}: {rule}", param=param)
