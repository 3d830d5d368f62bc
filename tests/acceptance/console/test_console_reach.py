"""The console by keyboard, on a phone, in the dark."""

from typing import TYPE_CHECKING

import pytest

from producer import Client
from producer.contract import ErrorCode, ErrorInfo
from tests.acceptance.console.conftest import OpenPage, see
from tests.fakes.fake_worker import FakeWorker
from tests.fakes.gateways import StartGateway
from tests.fakes.redis_reads import sorted_set_names

if TYPE_CHECKING:
    from playwright.sync_api import Page

FOCUSED = "() => { const e = document.activeElement; return (e.ariaLabel || e.textContent || e.id).trim(); }"
IS_FOCUS_SEEN = """() => { const style = getComputedStyle(document.activeElement);
                          return style.outlineStyle !== 'none' && parseFloat(style.outlineWidth) >= 2; }"""


@pytest.fixture
def busy(redis_url: str, worker: FakeWorker) -> FakeWorker:
    """A worker with a job that failed, one that runs and some that wait, all with long words."""
    worker.announce("an-organisation/a-model-with-a-rather-long-name-7B-Instruct")
    with Client(redis_url) as client:
        client.submit_many([{"prompt": "word" * 100} for _ in range(4)])
    held = worker.claim().begin()
    held.write("so far" * 80, finish_reason="error")
    held.end("failed", error=ErrorInfo(code=ErrorCode.ENGINE_ERROR, message="CUDA_ERROR_" * 20))
    worker.connection.zadd("rq:failed:promptmill", {held.job_id: 4e9})
    worker.claim().begin().write("and" * 200)
    return worker


def walk(page: "Page", limit: int = 60) -> list[str]:
    """What is focused in turn, each with a focus that is seen."""
    names: list[str] = []
    for _ in range(limit):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement === document.body"):
            break
        assert page.evaluate(IS_FOCUS_SEEN), page.evaluate(FOCUSED)
        names.append(page.evaluate(FOCUSED))
    return names


def test_everything_is_reached_with_the_tab_key(
    start_gateway: StartGateway, busy: FakeWorker, open_page: OpenPage
) -> None:
    page = open_page(start_gateway().url)
    page.get_by_role("button", name="Retry job").first.wait_for()
    names = walk(page)
    assert names[0] == "Skip to the content"
    for wanted in (
        "promptmill",
        "Overview",
        "Jobs",
        "Batches",
        "Theme: auto",
        "API key",
        "All ended jobs",
        "All failed jobs",
    ):
        assert wanted in names
    assert any(name.startswith("Retry job") for name in names)
    assert sum("point by point" in name for name in names) == 4


def test_the_skip_link_leads_to_the_content_and_views_say_where_one_is(
    start_gateway: StartGateway, busy: FakeWorker, open_page: OpenPage
) -> None:
    page = open_page(start_gateway().url)
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    page.get_by_role("link", name="Jobs", exact=True).press("Enter")
    see(page, "document.activeElement.tagName === 'H1' && document.title === 'Jobs · promptmill'")
    assert page.locator("#nav [aria-current=page]").text_content() == "Jobs"


@pytest.mark.parametrize("path", ["", "#/jobs", "#/jobs?state=failed", "#/batches", "job"])
def test_a_narrow_screen_is_never_scrolled_sideways(
    start_gateway: StartGateway, busy: FakeWorker, open_page: OpenPage, path: str
) -> None:
    job_id = sorted_set_names(busy.connection, "promptmill:leases:promptmill")[0]
    path = f"#/jobs/{job_id}" if path == "job" else path
    page = open_page(f"{start_gateway().url}/{path}", viewport={"width": 360, "height": 740})
    page.locator("h1").wait_for(state="attached")
    see(page, "!document.querySelector('main').textContent.includes('Loading')")
    wide = page.evaluate(
        """() => [...document.querySelectorAll('body *')]
                   .filter((e) => e.getBoundingClientRect().right > innerWidth + 0.5)
                   .filter((e) => !e.closest('pre, .hidden, .skip')).map((e) => e.outerHTML.slice(0, 120))"""
    )
    assert page.evaluate("document.documentElement.scrollWidth") <= 360 and not wide


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_colours_are_the_systems_until_others_are_chosen(
    start_gateway: StartGateway, open_page: OpenPage, scheme: str
) -> None:
    page = open_page(start_gateway().url, color_scheme=scheme)
    ground = "getComputedStyle(document.body).backgroundColor"
    before = page.evaluate(ground)
    assert (before == "rgb(14, 17, 23)") == (scheme == "dark")
    button = page.get_by_role("button", name="Theme: auto")
    button.click()
    if scheme == "light":
        page.get_by_role("button", name="Theme: light").click()
    assert page.evaluate(ground) != before
    page.reload()
    assert page.evaluate(ground) != before
