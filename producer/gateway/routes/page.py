"""GET /: the console's page, and its files. Anybody may have them: they show nothing that their reader may not ask for.

The page can run nothing and reach nobody but what is served here, and no other site may frame it.
"""

from http import HTTPStatus

from fastapi import APIRouter, Request, Response

from producer.gateway.console.page_files import page_files
from producer.gateway.errors import ApiError

router = APIRouter(tags=["console"])

HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-cache",  # asked for again each time, and sent again only where it has changed
}


@router.get("/", response_class=Response, responses={200: {"content": {"text/html": {}}}})
async def get_page(request: Request) -> Response:
    """The console."""
    return _respond(request, "index.html")


@router.get("/console/page/{name}", response_class=Response)
async def get_file(request: Request, name: str) -> Response:
    """A script, a style or a picture of the console."""
    return _respond(request, name)


def _respond(request: Request, name: str) -> Response:
    file = page_files().get(name)
    if file is None:
        raise ApiError(HTTPStatus.NOT_FOUND, "not_found", f"the console has no file {name[:60]!r}")
    headers = {**HEADERS, "etag": file.etag}
    if file.etag in request.headers.get("if-none-match", ""):
        return Response(status_code=HTTPStatus.NOT_MODIFIED, headers=headers)
    return Response(file.content, media_type=file.media_type, headers=headers)
