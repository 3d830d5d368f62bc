"""The console's page and its files: what comes with them, and that no other file does."""

import re

import httpx2 as httpx
import pytest

from tests.fakes.gateways import RunningGateway

TYPES = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}


def test_everything_the_page_names_is_served_with_its_type(gateway: RunningGateway) -> None:
    page = httpx.get(f"{gateway.url}/")
    assert page.status_code == 200 and page.headers["content-type"] == "text/html; charset=utf-8"
    names = re.findall(r'(?:src|href)="/console/page/([\w.]+)"', page.text)
    assert len(names) > 8
    for name in names:
        answer = httpx.get(f"{gateway.url}/console/page/{name}")
        assert answer.status_code == 200 and answer.headers["content-type"].startswith(TYPES[name[name.index(".") :]])


@pytest.mark.parametrize("path", ["/", "/console/page/main.js"])
def test_the_policy_lets_the_page_reach_nobody_else_and_nobody_frame_it(gateway: RunningGateway, path: str) -> None:
    headers = httpx.get(f"{gateway.url}{path}").headers
    policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'" and policy["frame-ancestors"] == "'none'"
    assert policy["script-src"] == policy["connect-src"] == policy["style-src"] == "'self'"
    assert policy["require-trusted-types-for"] == "'script'" and headers["x-content-type-options"] == "nosniff"


def test_a_file_that_has_not_changed_is_not_sent_again(gateway: RunningGateway) -> None:
    first = httpx.get(f"{gateway.url}/console/page/main.js")
    assert first.headers["cache-control"] == "no-cache"
    again = httpx.get(f"{gateway.url}/console/page/main.js", headers={"if-none-match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize("name", ["nothing.js", "..%2Fbodies.py", "%2e%2e/__init__.py", "main.js%00", "", "."])
def test_no_other_file_is_served(gateway: RunningGateway, name: str) -> None:
    assert httpx.get(f"{gateway.url}/console/page/{name}", follow_redirects=False).status_code in (404, 307)
