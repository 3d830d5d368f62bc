"""Who may see what in the console, and that nothing which a stranger wrote becomes more than text."""

from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from producer import Client
from producer.cli import main
from producer.contract import ErrorCode, ErrorInfo
from tests.acceptance.console.conftest import OpenPage, see
from tests.fakes.fake_worker import FakeWorker
from tests.fakes.gateways import StartGateway, open_client

if TYPE_CHECKING:
    from playwright.sync_api import Page

HOSTILE = (
    "<img src=x onerror='window.hacked=1'></script><script>window.hacked=1</script>\"'><svg onload=window.hacked=1>"
)


def make_key(redis_url: str, *arguments: str) -> str:
    done = CliRunner().invoke(main, ["keys", "add", *arguments, "--redis-url", redis_url], catch_exceptions=False)
    return done.output.strip()


def type_key(page: "Page", key: str, *, keep: bool = False) -> None:
    page.get_by_label("Key", exact=True).fill(key)
    page.get_by_label("Keep it in this browser").set_checked(keep)
    page.get_by_role("button", name="Use key").click()


def test_a_key_is_typed_once_and_lasts_as_long_as_the_tab(
    redis_url: str, start_gateway: StartGateway, worker: FakeWorker, open_page: OpenPage
) -> None:
    key = make_key(redis_url, "ops", "--operator")
    url = start_gateway().url
    page = open_page(url)
    page.get_by_text("This gateway asks for an API key.").wait_for()
    type_key(page, key[:-1] + ("A" if key[-1] != "A" else "B"))
    page.get_by_text("The key is not valid, or was revoked.").wait_for()
    type_key(page, "ключ")
    page.get_by_text("A key has letters, digits").wait_for()
    type_key(page, key)
    page.get_by_text("key “ops”, an operator's").wait_for()
    page.reload()
    page.get_by_text("key “ops”, an operator's").wait_for()
    other = page.context.new_page()
    other.goto(url)
    other.get_by_text("This gateway asks for an API key.").wait_for()
    type_key(other, key, keep=True)
    other.get_by_text("key “ops”, an operator's").wait_for()
    third = page.context.new_page()
    third.goto(url)
    third.get_by_text("key “ops”, an operator's").wait_for()
    third.get_by_role("button", name="API key").click()
    third.get_by_role("button", name="Forget key").click()
    third.get_by_text("This gateway asks for an API key.").wait_for()


def test_a_key_that_is_revoked_is_asked_for_anew(
    redis_url: str, start_gateway: StartGateway, worker: FakeWorker, open_page: OpenPage
) -> None:
    key = make_key(redis_url, "ops", "--operator")
    make_key(redis_url, "other")
    page = open_page(start_gateway().url)
    type_key(page, key)
    page.get_by_text("key “ops”, an operator's").wait_for()
    CliRunner().invoke(main, ["keys", "revoke", key.split("-")[1], "--redis-url", redis_url], catch_exceptions=False)
    page.get_by_text("The key is not valid, or was revoked.").wait_for()


def test_a_plain_key_sees_its_own_jobs_and_is_told_what_it_may_not(
    redis_url: str, start_gateway: StartGateway, worker: FakeWorker, open_page: OpenPage
) -> None:
    key = make_key(redis_url, "team")
    gateway = start_gateway()
    with Client(redis_url) as client:
        foreign = client.submit("somebody else's")
    headers = {"x-promptmill-detach": "true"}
    with open_client(gateway, api_key=key) as openai_client:
        openai_client.completions.create(model="fake", prompt="our own", stream=True, extra_headers=headers).close()
    page = open_page(gateway.url)
    type_key(page, key)
    page.get_by_text("Queues, workers and the figures of the whole system are shown to an operator's key").wait_for()
    assert page.get_by_role("region", name="Workers").count() == 0
    page.get_by_role("link", name="Jobs", exact=True).click()
    page.get_by_role("link", name="Waiting").click()
    page.get_by_text("our own").wait_for()
    assert page.get_by_text("somebody else's").count() == 0
    page.goto(f"{gateway.url}/#/jobs/{foreign.id}")
    page.get_by_text(f"there is no job {foreign.id}").wait_for()


def test_what_strangers_wrote_is_shown_as_text_and_never_run(
    redis_url: str, start_gateway: StartGateway, worker: FakeWorker, open_page: OpenPage
) -> None:
    worker.name = f"worker {HOSTILE}"
    worker.announce("fake", HOSTILE, queues=["promptmill", f"q{HOSTILE}"])
    with Client(redis_url) as client:
        job = client.submit(messages=[{"role": "user", "content": HOSTILE}], metadata={HOSTILE: HOSTILE})
    held = worker.claim().begin()
    held.write(HOSTILE, finish_reason="error")
    held.end("failed", error=ErrorInfo(code=ErrorCode.ENGINE_ERROR, message=HOSTILE))
    worker.connection.zadd("rq:failed:promptmill", {job.id: 4e9})
    worker.connection.hset("rq:job:javascript:alert(1)", mapping={"status": "queued", "description": HOSTILE})
    worker.connection.rpush("rq:queue:promptmill", "javascript:alert(1)", "../../evil?x=1#y")
    worker.connection.hset("rq:job:../../evil?x=1#y", mapping={"status": "queued", "origin": HOSTILE})
    gateway = start_gateway()
    page = open_page(gateway.url)
    page.get_by_role("region", name="Failed jobs").get_by_text(HOSTILE, exact=False).first.wait_for()
    assert page.get_by_role("region", name="Workers").get_by_text(HOSTILE).count() >= 1
    page.goto(f"{gateway.url}/#/jobs?state=waiting")
    page.get_by_role("link", name="../../evil?x").click()
    page.get_by_role("heading", name="../../evil?x=1#y").wait_for()
    page.goto(f"{gateway.url}/#/jobs/{job.id}")
    page.get_by_text("Parameters and metadata").click()
    for name in ("Output", "Message of user"):
        see(
            page,
            "([name, text]) => [...document.querySelectorAll('pre')].some("
            "(pre) => pre.ariaLabel === name && pre.textContent === text)",
            [name, HOSTILE],
        )
    assert page.evaluate("window.hacked") is None and page.locator("main img, main script").count() == 0


@pytest.mark.parametrize("header", ["content-security-policy", "x-content-type-options", "referrer-policy"])
def test_the_page_and_its_files_come_with_a_strict_policy(
    start_gateway: StartGateway, open_page: OpenPage, faults: list[str], header: str
) -> None:
    url = start_gateway().url
    page = open_page(url)
    for path in ("/", "/console/page/main.js", "/console/page/theme.css", "/console/page/icon.svg"):
        assert page.request.get(url + path).headers[header]
    blocked = page.evaluate(
        """async () => { const script = document.createElement('script');
                         try { script.text = 'window.hacked = 1'; document.head.append(script); } catch { return true; }
                         return window.hacked === undefined; }"""
    )
    assert blocked, "not even a script of our own may write one"
    assert any("TrustedScript" in fault for fault in faults)
    faults.clear()
