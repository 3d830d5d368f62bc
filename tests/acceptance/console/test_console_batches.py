"""Batches in the console, against the shapes of `/v1/batches` and `/v1/files` on the wire."""

import asyncio
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.acceptance.console.conftest import OpenPage, see
from tests.fakes.batches import batch_bench, line
from tests.fakes.fake_worker import FakeWorker, echo
from tests.fakes.gateways import StartGateway

if TYPE_CHECKING:
    from playwright.sync_api import Page, Route

HOSTILE = "<img src=x onerror='window.hacked=1'>"


def batch(number: int, status: str = "in_progress", **fields: Any) -> dict[str, Any]:
    counts = {"total": 200, "completed": 118, "failed": 2}
    body = {
        "id": f"batch_{number:04}",
        "object": "batch",
        "endpoint": "/v1/chat/completions",
        "input_file_id": "file-in",
        "completion_window": "24h",
        "status": status,
        "created_at": int(time.time()) - 600,
        "expires_at": int(time.time()) + 3600,
        "model": "fake",
        "errors": None,
        "request_counts": counts,
        "output_file_id": None,
        "error_file_id": None,
    }
    return {**body, **fields}


class FakeBatches:
    """Answers what the page asks for batches and files, from a list of batches, the newest first."""

    def __init__(self, batches: list[dict[str, Any]]) -> None:
        self.batches = batches
        self.cancelled: list[str] = []

    def install(self, page: "Page") -> None:
        page.route("**/v1/batches?*", self._list)
        page.route("**/v1/batches/*/cancel", self._cancel)
        page.route("**/v1/files/*/content", lambda route: route.fulfill(body='{"custom_id":"a"}\n'))

    def _list(self, route: "Route") -> None:
        query = dict(part.split("=") for part in route.request.url.partition("?")[2].split("&"))
        ids = [item["id"] for item in self.batches]
        start = ids.index(query["after"]) + 1 if "after" in query else 0
        page = self.batches[start : start + int(query["limit"])]
        has_more = start + len(page) < len(ids)
        route.fulfill(json={"object": "list", "data": page, "has_more": has_more})

    def _cancel(self, route: "Route") -> None:
        batch_id = route.request.url.split("/")[-2]
        self.cancelled.append(batch_id)
        for item in self.batches:
            if item["id"] == batch_id:
                item["status"] = "cancelling"
        route.fulfill(json=next(item for item in self.batches if item["id"] == batch_id))


@pytest.fixture
def open_batches(start_gateway: StartGateway, open_page: OpenPage, redis_url: str) -> Any:
    url = start_gateway().url

    def open_batches(batches: list[dict[str, Any]], path: str = "#/batches") -> tuple["Page", FakeBatches]:
        fake = FakeBatches(batches)
        page = open_page("about:blank")
        fake.install(page)
        page.goto(f"{url}/{path}")
        return page, fake

    return open_batches


def test_a_running_batch_shows_how_far_it_is_and_goes_on(open_batches: Any) -> None:
    page, fake = open_batches([batch(1)])
    page.get_by_text("118 of 200 requests answered, 2 failed").wait_for()
    assert page.get_by_text("60 %").is_visible() and page.get_by_text("in progress").is_visible()
    row = page.locator("li[data-key=batch_0001]").element_handle()
    fake.batches[0]["request_counts"] = {"total": 200, "completed": 200, "failed": 0}
    fake.batches[0].update(status="completed", completed_at=int(time.time()), output_file_id="file-out")
    page.get_by_text("100 %").wait_for()
    assert row.evaluate("(row) => row.isConnected"), "the row is brought up to date in place"
    with page.expect_download() as download:
        page.get_by_role("button", name="Save the output file file-out").click()
    assert download.value.suggested_filename == "file-out.jsonl"
    assert json.loads(download.value.path().read_text()) == {"custom_id": "a"}


def test_a_batch_is_cancelled_once_that_is_confirmed(open_batches: Any) -> None:
    page, fake = open_batches([batch(1), batch(2, "completed"), batch(3, "finalizing")])
    assert page.get_by_role("button", name="Cancel batch").count() <= 1, "one that ends by itself is left alone"
    page.get_by_text("finalizing").wait_for()
    assert page.get_by_role("button", name="Cancel batch").count() == 1, "what ends by itself is left alone"
    page.get_by_role("button", name="Cancel batch batch_0001").click()
    page.get_by_role("button", name="Cancel the batch").click()
    page.get_by_text("The batch is being cancelled.").wait_for()
    assert fake.cancelled == ["batch_0001"]
    page.get_by_text("cancelling", exact=True).wait_for()


def test_a_file_that_failed_validation_says_what_is_wrong_in_which_line(open_batches: Any, faults: list[str]) -> None:
    problems = [{"code": "invalid_json_line", "line": 7, "message": HOSTILE, "param": None}]
    failed = batch(1, "failed", errors={"object": "list", "data": problems}, request_counts=None, model=None)
    page, _ = open_batches([failed])
    page.get_by_text("1 problem").click()
    page.get_by_text("Line 7:").wait_for()
    assert page.get_by_text(HOSTILE).is_visible() and page.evaluate("window.hacked") is None


def test_more_batches_than_a_page_are_shown_on_demand(open_batches: Any) -> None:
    page, _ = open_batches([batch(number, "completed") for number in range(45)])
    see(page, "document.querySelectorAll('.batches li').length === 20")
    page.get_by_role("button", name="Show more").click()
    see(page, "document.querySelectorAll('.batches li').length === 40")
    page.get_by_role("button", name="Show more").click()
    see(page, "document.querySelectorAll('.batches li').length === 45 && !document.querySelector('#more')")


def test_the_overview_shows_the_last_batches(open_batches: Any) -> None:
    page, _ = open_batches([batch(number) for number in range(8)], path="")
    see(page, "document.querySelectorAll('.batches li').length === 5")


def test_a_batch_runs_to_its_end_before_the_readers_eyes(
    start_gateway: StartGateway, open_page: OpenPage, low: FakeWorker, redis_url: str
) -> None:
    async def make() -> str:
        async with batch_bench(redis_url, Path(os.environ["PROMPTMILL_FILES"])) as bench:
            return (await bench.create([line(f"r{at}") for at in range(5)])).id

    page = open_page(f"{start_gateway().url}/#/batches")
    page.get_by_text("There is no batch.").wait_for()
    with ThreadPoolExecutor() as thread:  # Playwright has a loop on this one
        batch_id = thread.submit(lambda: asyncio.run(make())).result()
    page.get_by_text(batch_id).wait_for()
    page.get_by_text("0 of 5 requests answered").wait_for()
    with low.serving(echo):
        page.get_by_text("5 of 5 requests answered, 0 failed").wait_for()
        page.get_by_text("completed", exact=True).wait_for()
    with page.expect_download() as download:
        page.get_by_role("button", name="Save the output file").click()
    answers = [json.loads(text) for text in download.value.path().read_text().splitlines()]
    assert {answer["custom_id"] for answer in answers} == {f"r{at}" for at in range(5)}
