"""What is refused and not told: bodies, origins and addresses; what the log says."""

import gzip
import logging
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest
import redis
from click.testing import CliRunner

from producer import SettingsError
from producer.cli import main
from producer.gateway.cli import gateway as gateway_command
from producer.gateway.files.file_keys import STORE_KEY, UNRECORDED_KEY
from tests.fakes.command_line import new_key
from tests.fakes.fake_worker import FakeWorker
from tests.fakes.gateways import RunningGateway, StartGateway, open_client, running_gateway
from tests.fakes.waiting import wait_until


@pytest.mark.parametrize(
    ("content", "content_type", "status"),
    [
        (b"{", "application/json", 400),
        (b"[]", "application/json", 400),
        (b'{"model": NaN}', "application/json", 400),
        (b"[" * 50_000, "application/json", 400),
        (b'{"metadata": ' + b'{"a":' * 100 + b"1" + b"}" * 101, "application/json", 400),
        (b'{"model": "fake"}', "text/plain", 415),
        (b"\xff", "application/json", 400),
    ],
)
def test_a_body_that_is_no_request_is_refused(
    gateway: RunningGateway, content: bytes, content_type: str, status: int
) -> None:
    answer = httpx.post(f"{gateway.url}/v1/completions", content=content, headers={"content-type": content_type})
    assert answer.status_code == status and answer.json()["error"]["message"] and answer.headers["x-request-id"]


def test_a_packed_body_is_refused_with_the_remedy(gateway: RunningGateway) -> None:
    """Nothing here is unpacked: what a kilobyte may become is never known before."""
    headers = {"content-type": "application/json", "content-encoding": "gzip"}
    answer = httpx.post(f"{gateway.url}/v1/completions", content=gzip.compress(b"{}"), headers=headers)
    assert answer.status_code == 415 and "content-encoding: bodies are taken as they are" in answer.text


def test_no_answer_quotes_all_that_it_was_given(gateway: RunningGateway) -> None:
    number = b'{"model": "fake", "prompt": "x", "n": ' + b"9" * 5000 + b"}"
    answers = [
        httpx.post(f"{gateway.url}/v1/completions", json={"model": "m" * 9000, "prompt": "x"}),
        httpx.post(f"{gateway.url}/v1/completions", json={"model": "fake", "prompt": "x", "y" * 9000: 1}),
        httpx.post(f"{gateway.url}/v1/completions", content=number, headers={"content-type": "application/json"}),
        httpx.post(f"{gateway.url}/v1/batches", json={"y" * 9000: 1}),
        *(httpx.get(f"{gateway.url}/{path}/{'z' * 9000}") for path in ("v1/models", "v1/jobs", "v1", "console/jobs")),
    ]
    assert [answer.status_code for answer in answers] == [400, 400, 400, 400, 404, 404, 404, 404]
    assert max(len(answer.content) for answer in answers) < 4600
    assert "set_int_max_str_digits" not in answers[2].text


def test_other_origins_are_refused_unless_they_are_named(start_gateway: StartGateway) -> None:
    ask = {"origin": "https://app.example", "access-control-request-method": "POST"}
    closed = httpx.options(f"{start_gateway().url}/v1/completions", headers=ask)
    assert "access-control-allow-origin" not in closed.headers
    named = httpx.options(f"{start_gateway(cors_origins='https://app.example').url}/v1/completions", headers=ask)
    assert named.headers["access-control-allow-origin"] == "https://app.example"


def test_the_log_has_neither_prompts_nor_keys(
    redis_url: str, gateway: RunningGateway, echoing: FakeWorker, caplog: pytest.LogCaptureFixture
) -> None:
    key = new_key(redis_url, "team")
    caplog.set_level(logging.DEBUG)
    with open_client(gateway, api_key=key) as client:
        client.completions.create(model="fake", prompt="a-very-secret-prompt", extra_headers={"x-request-id": "mine-1"})
        with pytest.raises(openai.BadRequestError):
            client.completions.create(model="fake", prompt="a-very-secret-prompt", temperature=9)
    ours = "\n".join(record.getMessage() for record in caplog.records if record.name.startswith("producer"))
    assert "request_id=mine-1" in ours and key.split("-")[1] in ours
    assert "secret-prompt" not in ours and key not in ours


def test_an_idempotency_key_makes_one_job_of_two_requests(gateway: RunningGateway, worker: FakeWorker) -> None:
    headers = {"Idempotency-Key": "order-7"}
    with open_client(gateway) as client:
        first = client.completions.create(model="fake", prompt="x", stream=True, extra_headers=headers)
        job = worker.claim().begin()
        job.write("a")
        assert next(iter(first)).choices[0].text == "a"
        first.close()  # the job goes on: its name says that it will be asked for again
        second = client.completions.create(model="fake", prompt="x", stream=True, extra_headers=headers)
        job.write("b", finish_reason="stop")
        job.end()
        assert "".join(chunk.choices[0].text for chunk in second) == "ab"
        with pytest.raises(openai.ConflictError) as error:
            client.completions.create(model="fake", prompt="y", extra_headers=headers)
    assert error.value.code == "idempotency_conflict" and error.value.response.headers["x-should-retry"] == "false"
    body: Any = error.value.body
    assert error.value.param == "idempotency_key" and body["message"].startswith("idempotency_key: was used")


def test_redis_away_is_unavailable_and_unhealthy() -> None:
    with running_gateway("redis://127.0.0.1:1") as gateway:
        with open_client(gateway) as client, pytest.raises(openai.InternalServerError) as error:
            client.completions.create(model="fake", prompt="x")
        assert (error.value.status_code, error.value.code) == (503, "queue_unavailable")
        health = httpx.get(f"{gateway.url}/health", timeout=30)
        assert health.status_code == 503 and health.json()["redis"] == "unreachable"
        assert httpx.get(f"{gateway.url}/health/live").json() == {"status": "alive"}
        assert httpx.get(f"{gateway.url}/metrics", timeout=30).status_code == 503, "nobody can say who may see it"


def test_a_gateway_nobody_listens_to_is_a_connection_error() -> None:
    client = openai.OpenAI(base_url="http://127.0.0.1:1/v1", api_key="x", max_retries=0)
    with client, pytest.raises(openai.APIConnectionError):
        client.models.list()


def test_a_client_that_waits_no_longer_gets_its_timeout_and_its_job_ends(
    gateway: RunningGateway, worker: FakeWorker
) -> None:
    with open_client(gateway, timeout=2.0) as client, pytest.raises(openai.APITimeoutError):
        client.completions.create(model="fake", prompt="x")
    [job] = worker.connection.keys("rq:job:*")
    wait_until(lambda: worker.connection.hget(job, "status") == b"canceled")


def test_a_website_reaches_nothing_by_its_visitors_browser_where_no_key_is_asked_for(
    redis_url: str, start_gateway: StartGateway, echoing: FakeWorker
) -> None:
    gateway, open_to_all = start_gateway(), start_gateway(allow_anonymous=True)
    sites = [{"host": "evil.example"}, {"origin": "https://evil.example"}, {"origin": "null"}, {"origin": "http://[x"}]
    for site in sites:
        for path in ("/v1/models", "/v1/files", "/stats", "/console/jobs"):
            refused = httpx.get(gateway.url + path, headers=site)
            assert refused.status_code == 403, path
            assert refused.json()["error"]["code"] == f"foreign_{next(iter(site))}"
        form = {"file": ("a.jsonl", b"{}")}
        assert httpx.post(f"{gateway.url}/v1/files", files=form, headers=site).status_code == 403
        for some_key in ({}, {"authorization": "Bearer none"}):
            assert httpx.get(f"{open_to_all.url}/v1/models", headers=site | some_key).status_code == 200
    key = {"authorization": f"Bearer {new_key(redis_url, 'mine')}"}
    with_keys = start_gateway()
    assert [httpx.get(f"{with_keys.url}/v1/models", headers=site | key).status_code for site in sites] == [200] * 4


def test_names_that_no_website_can_have_and_allowed_origins_are_served_without_a_key(
    start_gateway: StartGateway, echoing: FakeWorker
) -> None:
    gateway = start_gateway(cors_origins="https://ours.example")
    for host in ("localhost:8000", "127.0.0.1", "[::1]:8000", "gateway", "host.docker.internal"):
        headers = {"host": host, "origin": f"http://{host}"}
        assert httpx.get(f"{gateway.url}/console/jobs", headers=headers).status_code == 200, host
    allowed = httpx.get(f"{gateway.url}/v1/models", headers={"origin": "https://ours.example"})
    assert allowed.status_code == 200


def test_other_addresses_than_loopback_need_a_key_or_a_flag(redis_url: str) -> None:
    done = CliRunner().invoke(main, ["gateway", "--http-host", "0.0.0.0", "--redis-url", redis_url])
    assert done.exit_code == 2 and "--allow-anonymous" in done.output


def test_a_gateway_whose_files_lie_elsewhere_does_not_start(
    redis_url: str, redis_client: redis.Redis, tmp_path: Path
) -> None:
    redis_client.set(STORE_KEY, "another /elsewhere")
    redis_client.zadd(UNRECORDED_KEY, {"a-part": 1})  # a store without anything is nobody's
    arguments = ["gateway", "--http-port", "0", "--files", str(tmp_path), "--redis-url", redis_url]
    command = [sys.executable, "-m", "producer", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "lie in /elsewhere, and this gateway's --files is" in done.stderr and "Traceback" not in done.stderr


def test_the_figures_name_queues_workers_and_waits(gateway: RunningGateway, echoing: FakeWorker) -> None:
    with open_client(gateway) as client:
        list(client.completions.create(model="fake", prompt="a b c", stream=True))
    text = httpx.get(f"{gateway.url}/metrics").text
    for line in (
        'promptmill_http_requests_total{method="POST",route="/v1/completions",status="200"} 1.0',
        'promptmill_time_to_first_token_seconds_count{model="fake"} 1.0',
        'promptmill_inter_token_seconds_count{model="fake"} 2.0',
        'promptmill_queue_jobs{queue="promptmill",state="waiting"} 0.0',
        'promptmill_queue_oldest_job_seconds{queue="promptmill"} 0.0',
        'promptmill_worker_kv_blocks_free{model="fake",worker="fake"} 0.0',
        "promptmill_workers 1.0",
    ):
        assert line in text
    stats = httpx.get(f"{gateway.url}/stats").json()
    assert stats["workers"][0]["name"] == "fake" and stats["queues"][0]["name"] == "promptmill"
    assert [queue["is_at_rest"] for queue in stats["queues"]] == [False]


def test_a_socket_that_others_can_reach_is_not_taken_for_one_of_this_machine(redis_url: str, tmp_path: Path) -> None:
    def refusal(fd: int) -> str:
        done = CliRunner().invoke(gateway_command, ["--redis-url", redis_url, "--http-fd", str(fd)])
        assert isinstance(done.exception, SettingsError)
        return str(done.exception)

    with socket.create_server(("0.0.0.0", 0)) as listener:
        assert re.search(
            r"--http-fd \d+: is bound to 0\.0\.0\.0; say so with --http-host", refusal(os.dup(listener.fileno()))
        )
    with (tmp_path / "file").open("w") as file:
        assert "pass a socket on to the gateway" in refusal(file.fileno())
    with socket.socket(socket.AF_UNIX) as listener:
        assert "is not a TCP socket; pass the gateway a bound one" in refusal(os.dup(listener.fileno()))
