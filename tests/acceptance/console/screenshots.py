"""The pictures in docs/: the console over a simulated fleet, light, dark and on a phone.

    python -m tests.acceptance.console.screenshots

Needs Playwright, and a Chromium: pip install "promptmill[browser]".
"""

import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from tests.acceptance.console.chromium import CHROMIUM_FLAGS, find_chromium
from tests.acceptance.console.fleet import Fleet
from tests.fakes.gateways import RunningGateway, running_gateway
from worker.embedded_redis import EmbeddedRedis

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

DOCS = Path(__file__).parents[3] / "docs"
LIVE_SECONDS = 30.0
MAX_BYTES = 300_000
TALL = {"width": 1280, "height": 1500}
DESKTOP = {"width": 1280, "height": 860}
PHONE = {"width": 390, "height": 844}


def main() -> None:
    from playwright.sync_api import sync_playwright

    chromium = find_chromium()
    if chromium is None:
        sys.exit("no Chromium is installed")
    DOCS.mkdir(exist_ok=True)
    with EmbeddedRedis() as server, TemporaryDirectory() as files:
        fleet = Fleet(server.url)
        fleet.write_history()
        fleet.start(Path(files))
        try:
            with running_gateway(server.url, files=files) as gateway, sync_playwright() as driver:
                time.sleep(LIVE_SECONDS)
                take_all(gateway, driver.chromium.launch(executable_path=chromium, args=CHROMIUM_FLAGS))
        finally:
            fleet.stop()


def take_all(gateway: RunningGateway, browser: "Browser") -> None:
    for theme in ("light", "dark"):
        page = open_page(browser, gateway.url, theme, TALL)
        page.locator(".plot .line").first.wait_for(state="attached")
        page.mouse.move(900, 330)
        shoot(page, f"console-{theme}")
    page = open_page(browser, f"{gateway.url}/#/jobs", "light", DESKTOP)
    page.locator("tbody a").first.wait_for()
    shoot(page, "console-jobs")
    page.locator("tbody a").nth(1).click()
    page.locator(".answer:not(:empty)").wait_for()
    shoot(page, "console-job")
    page = open_page(browser, f"{gateway.url}/#/batches", "light", DESKTOP)
    page.locator(".batches li").first.wait_for()
    shoot(page, "console-batches")
    page = open_page(browser, gateway.url, "light", PHONE)
    page.locator(".plot .line").first.wait_for(state="attached")
    shoot(page, "console-phone")
    browser.close()


def open_page(browser: "Browser", url: str, theme: str, viewport: dict[str, int]) -> "Page":
    page = browser.new_context(viewport=viewport, color_scheme=theme).new_page()
    page.goto(url)
    page.wait_for_timeout(2_500)  # every part has been asked for
    return page


def shoot(page: "Page", name: str) -> None:
    path = DOCS / f"{name}.png"
    page.screenshot(path=path)
    size = path.stat().st_size
    print(f"{path.relative_to(DOCS.parent)}: {size // 1024} KiB")
    assert size <= MAX_BYTES, f"{name} has {size} bytes"


if __name__ == "__main__":
    main()
