"""What people see and do in the console."""

import re
import time
from typing import TYPE_CHECKING

import pytest
import redis

from producer import Client, Job
from producer.contract import ErrorCode, ErrorInfo, Timings
from tests.acceptance.console.conftest import OpenPage, see
from tests.fakes.fake_worker import FakeWorker
from tests.fakes.gateways import StartGateway, running_gateway
from tests.fakes.held_job import HeldJob
from tests.fakes.redis_proxy import CuttingProxy
from tests.fakes.waiting import wait_until

if TYPE_CHECKING:
    from playwright.sync_api import Page


def finish(held: HeldJob, text: str = "done") -> None:
    held.timings = Timings(queued=0.2, first_token=0.5, total=1.5)
    held.write(text, finish_reason="stop")
    held.end()


def fail(held: HeldJob, message: str = "out of luck") -> None:
    held.write("so far", finish_reason="error")
    held.end("failed", error=ErrorInfo(code=ErrorCode.ENGINE_ERROR, message=message))
    held.connection.zadd(f"rq:failed:{held.queue}", {held.job_id: time.time() + 3600})


def panel(page: "Page", name: str) -> "Page":
    return page.get_by_role("region", name=name, exact=True)


def test_the_overview_shows_queues_workers_jobs_and_the_last_hour(
    redis_url: str, redis_client: redis.Redis, start_gateway: StartGateway, worker: FakeWorker, open_page: OpenPage
) -> None:
    redis_client.sadd("rq:queues", "rq:queue:promptmill@acme")
    redis_client.zadd("rq:finished:promptmill@acme", {"x": time.time()})
    with Client(redis_url) as client:
        client.submit_many([{"prompt": f"Prompt {at}"} for at in range(4)])
    finish(worker.claim().begin())
    fail(worker.claim().begin())
    worker.claim().begin()
    page = open_page(start_gateway().url)
    queues = panel(page, "Queues").get_by_role("row").filter(has_text="promptmill")
    queues.first.wait_for()
    assert queues.first.get_by_role("cell").first.text_content() == "1"
    assert queues.count() == 1 and panel(page, "Queues").get_by_text("and 1 queue of tenants at rest").is_visible()
    assert panel(page, "Workers").get_by_role("row", name="fake").is_visible()
    ended = panel(page, "Recent jobs").get_by_role("row")
    ended.nth(2).wait_for()
    assert "finished" in (ended.nth(2).text_content() or "") and "Prompt 0" in (ended.nth(2).text_content() or "")
    assert "out of luck" in (panel(page, "Failed jobs").text_content() or "")
    plots = page.get_by_role("slider")
    assert plots.count() == 4
    plots.first.focus()
    page.keyboard.press("ArrowLeft")
    see(page, r"/^\d\d:\d\d:\d\d/.test(document.activeElement.getAttribute('aria-valuetext'))")
    page.keyboard.press("Escape")
    see(page, "document.activeElement.getAttribute('aria-valuetext')?.startsWith('last hour')")


def test_a_plot_shows_the_jobs_of_the_hour_under_the_pointer(
    redis_url: str, start_gateway: StartGateway, worker: FakeWorker, open_page: OpenPage
) -> None:
    with Client(redis_url) as client:
        client.submit("x")
    held = worker.claim().begin()
    held.timings = Timings(first_token=0.5, total=2.0)
    held.write("done", finish_reason="stop")
    held.write_done("finished")
    entry = f"{(int(time.time()) - 600) * 1000}-0"  # it ended ten minutes ago
    worker.connection.xadd("promptmill:results:promptmill", {"d": held.result("finished").to_wire()}, id=entry)
    page = open_page(start_gateway().url)
    total = page.get_by_role("slider", name="Total time")
    see(page, "document.querySelectorAll('[role=slider]')[3]?.getAttribute('aria-valuetext')?.includes('p50 2 s')")
    found = total.evaluate(
        """(area) => { const box = area.querySelector('path.first').getBBox(), place = area.getBoundingClientRect();
                       return [place.left + box.x, place.top + box.y]; }"""
    )
    page.mouse.move(*found)
    see(page, r"/^\d\d:\d\d:\d\d/.test(document.querySelectorAll('.plot-when')[3].textContent)")
    assert "2 s" in (total.get_attribute("aria-valuetext") or "")


def test_a_live_stream_goes_on_at_its_cursor_when_the_gateway_comes_back(
    redis_url: str, worker: FakeWorker, open_page: OpenPage
) -> None:
    with Client(redis_url) as client:
        job = client.submit("Tell me.", metadata={"order": 7})
    held = worker.claim().begin()
    with running_gateway(redis_url) as gateway:
        port = gateway.port
        page = open_page(f"{gateway.url}/#/jobs/{job.id}")
        held.write("One, ")
        see(page, "document.querySelector('.answer')?.textContent === 'One, '")
        assert page.get_by_text("running", exact=True).is_visible()
    held.write("two, ")
    page.get_by_text("The gateway cannot be reached").wait_for()
    with running_gateway(redis_url, http_port=port):
        see(page, "document.querySelector('.answer')?.textContent === 'One, two, '")
        finish(held, "three.")
        see(page, "document.querySelector('.answer')?.textContent === 'One, two, three.'")
        page.get_by_text("finished", exact=True).wait_for()
        page.get_by_text("The gateway cannot be reached").wait_for(state="detached")
        page.get_by_text("Parameters and metadata").click()
        assert '"order": 7' in (page.get_by_label("Parameters", exact=True).text_content() or "")


def test_what_a_reset_makes_void_is_taken_back(
    redis_url: str, start_gateway: StartGateway, worker: FakeWorker, open_page: OpenPage
) -> None:
    with Client(redis_url) as client:
        job = client.submit("x")
    first = worker.claim().begin()
    first.write("void")
    page = open_page(f"{start_gateway().url}/#/jobs/{job.id}")
    see(page, "document.querySelector('.answer')?.textContent === 'void'")
    first.hand_over()
    second = worker.claim().begin(reset=True)
    finish(second, "anew")
    see(page, "document.querySelector('.answer')?.textContent === 'anew'")


def test_a_running_job_is_cancelled_once_that_is_confirmed(
    redis_url: str, start_gateway: StartGateway, worker: FakeWorker, open_page: OpenPage
) -> None:
    with Client(redis_url) as client:
        job = client.submit("x")
    held = worker.claim().begin()
    page = open_page(f"{start_gateway().url}/#/jobs")
    page.get_by_role("button", name=f"Cancel job {job.id}").click()
    page.get_by_role("button", name="Keep going").click()
    assert not held.is_cancelled()
    page.get_by_role("button", name=f"Cancel job {job.id}").click()
    page.get_by_role("button", name="Cancel the job").click()
    page.get_by_text("1 job cancelled.").wait_for()
    assert held.is_cancelled()
    held.end("cancelled")


def test_failed_jobs_are_put_back_one_by_one_and_together(
    redis_url: str, start_gateway: StartGateway, worker: FakeWorker, open_page: OpenPage
) -> None:
    with Client(redis_url) as client:
        jobs = client.submit_many([{"prompt": f"{at}"} for at in range(3)])
    for _ in jobs:
        fail(worker.claim().begin())
    page = open_page(f"{start_gateway().url}/#/jobs?state=failed")
    page.get_by_role("button", name=f"Retry job {jobs[0].id}").click()
    page.get_by_text("1 job queued again.").wait_for()
    page.get_by_role("button", name="Retry these 2 jobs that failed").click()
    page.get_by_role("button", name="Retry them").click()
    page.get_by_text("No job has failed in the last 24 hours.").wait_for()
    assert worker.connection.llen("rq:queue:promptmill") == 3


def test_a_retried_job_is_followed_again_on_its_own_page(
    redis_url: str, start_gateway: StartGateway, worker: FakeWorker, open_page: OpenPage
) -> None:
    with Client(redis_url) as client:
        job: Job = client.submit("x")
    fail(worker.claim().begin())
    page = open_page(f"{start_gateway().url}/#/jobs/{job.id}")
    page.get_by_text("out of luck").wait_for()
    page.get_by_role("button", name=re.compile("^Retry job")).click()
    finish(worker.claim().begin(reset=True), "well done")
    see(page, "document.querySelector('.answer')?.textContent === 'well done'")
    page.get_by_text("out of luck").wait_for(state="detached")


def test_an_unknown_job_says_so(start_gateway: StartGateway, worker: FakeWorker, open_page: OpenPage) -> None:
    page = open_page(f"{start_gateway().url}/#/jobs")
    page.get_by_label("Job id").fill("chatcmpl-nobody")
    page.get_by_role("button", name="Open").click()
    page.get_by_text("there is no job nobody, or it is no longer kept").wait_for()


def test_redis_away_is_said_what_was_seen_stays_and_it_goes_on_afterwards(
    redis_client: redis.Redis, worker: FakeWorker, open_page: OpenPage
) -> None:
    port = redis_client.connection_pool.connection_kwargs["port"]
    with CuttingProxy(port, seed=1) as proxy, running_gateway(proxy.url) as gateway:
        page = open_page(gateway.url)
        row = panel(page, "Workers").get_by_role("row", name="fake")
        row.wait_for()
        with proxy.partition():
            page.get_by_text("The gateway cannot reach Redis.").wait_for()
            assert row.is_visible() and page.get_by_text("Not connected").is_visible()
        page.get_by_text("The gateway cannot reach Redis.").wait_for(state="detached")
        page.get_by_text("Live", exact=True).wait_for()


def test_rows_and_focus_stay_while_figures_change(
    redis_url: str, start_gateway: StartGateway, worker: FakeWorker, open_page: OpenPage
) -> None:
    with Client(redis_url) as client:
        first = client.submit("first")
        worker.claim().begin()
        page = open_page(f"{start_gateway().url}/#/jobs")
        button = page.get_by_role("button", name=f"Cancel job {first.id}")
        button.focus()
        row = page.locator(f"tr[data-key='{first.id}']").element_handle()
        client.submit("second")
        worker.claim().begin()
        see(page, "document.querySelectorAll('tbody tr').length === 2")
    assert row.evaluate("(row) => row.isConnected && row.contains(document.activeElement)")
    assert row.evaluate("(row) => row === document.querySelectorAll('tbody tr')[1]"), "the newer one stands above"


@pytest.mark.parametrize("path", ["", "#/jobs?state=failed", "#/batches"])
def test_every_view_has_an_empty_state_and_landmarks(
    start_gateway: StartGateway, redis_url: str, open_page: OpenPage, path: str
) -> None:
    page = open_page(f"{start_gateway().url}/{path}")
    page.locator(".empty:not(:text('Loading'))").first.wait_for()
    for role in ("banner", "navigation", "main", "contentinfo"):
        assert page.get_by_role(role).first.is_visible()
    assert page.locator("h1").count() == 1
    wait_until(lambda: page.get_by_text("Live", exact=True).is_visible())
