"""The console in a real browser: a headless Chromium, where one and Playwright are installed."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest

from tests.acceptance.console.chromium import CHROMIUM_FLAGS, find_chromium

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

WAIT_MS = 20_000
POLL_MS = 50

OpenPage = Callable[..., "Page"]


@pytest.fixture(scope="session")
def browser() -> Iterator["Browser"]:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install promptmill[browser]")
    chromium = find_chromium()
    if chromium is None:
        pytest.skip("needs Chromium: none is installed")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=CHROMIUM_FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def faults() -> list[str]:
    """Scripts that failed, and what the page's policy has stopped."""
    return []


@pytest.fixture
def open_page(browser: "Browser", faults: list[str]) -> Iterator[OpenPage]:
    """Open an address in a browser of its own: no storage is shared. A fault fails the test in the end."""
    with ExitStack() as stack:

        def open_page(url: str, **options: Any) -> "Page":
            context = stack.enter_context(
                browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
            )
            context.set_default_timeout(WAIT_MS)
            page = context.new_page()
            watch(page, faults)
            page.goto(url)
            return page

        yield open_page
    assert not faults


def watch(page: "Page", faults: list[str]) -> None:
    page.on("pageerror", lambda error: faults.append(str(error)))

    def on_console(message: Any) -> None:
        # A request that is refused or not answered is logged by the browser itself: the page says so on its own.
        if message.type == "error" and "Failed to load resource" not in message.text:
            faults.append(message.text)

    page.on("console", on_console)


def see(page: "Page", expression: str, argument: Any = None) -> None:
    """Wait until a JavaScript expression holds. Playwright's own wait needs `eval`, which the page's policy forbids."""
    for _ in range(WAIT_MS // POLL_MS):
        if page.evaluate(expression, argument):
            return
        page.wait_for_timeout(POLL_MS)
    raise AssertionError(f"it did not come to that: {expression}")
