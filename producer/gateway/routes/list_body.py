"""A page of a list, as OpenAI's clients go through it."""

from typing import Any


def list_body(data: list[dict[str, Any]], *, has_more: bool) -> dict[str, Any]:
    """`data`: the page's objects, each with its `id`."""
    first_id, last_id = (data[0]["id"], data[-1]["id"]) if data else (None, None)
    return {"object": "list", "data": data, "first_id": first_id, "last_id": last_id, "has_more": has_more}
