"""What the console asks for: who the caller is, the last hour, jobs in lists and one by one, retries and cancels."""

import json
import time
from typing import Any

import httpx2 as httpx
import openai
import pytest
import redis
from redis.typing import EncodableT, FieldT

from producer import Client
from producer.contract import ErrorCode, ErrorInfo, Result, Timings, Usage, keys
from tests.fakes.command_line import new_key
from tests.fakes.fake_worker import FakeWorker, echo
from tests.fakes.gateways import RunningGateway, StartGateway, open_client, running_gateway
from tests.fakes.waiting import wait_until


def ask(gateway: RunningGateway, path: str, key: str | None = None, **parameters: Any) -> Any:
    answer = httpx.get(f"{gateway.url}/console/{path}", headers=_headers(key), params=parameters)
    assert answer.status_code == 200, answer.text
    return answer.json()


def do(gateway: RunningGateway, deed: str, job_ids: list[str], key: str | None = None) -> list[tuple[str, bool]]:
    answer = httpx.post(f"{gateway.url}/console/jobs/{deed}", headers=_headers(key), json={"job_ids": job_ids})
    assert answer.status_code == 200, answer.text
    return [(job["job_id"], job["is_done"]) for job in answer.json()["jobs"]]


def _headers(key: str | None) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"} if key is not None else {}


def ids(gateway: RunningGateway, state: str, key: str | None = None) -> list[str]:
    return [job["id"] for job in ask(gateway, "jobs", key, state=state)["jobs"]]


def start(gateway: RunningGateway, prompt: str, key: str = "none") -> str:
    """A job through the gateway that goes on without its client; its id."""
    with open_client(gateway, api_key=key) as client:
        stream = client.completions.with_streaming_response.create(
            model="fake", prompt=prompt, stream=True, extra_headers={"x-promptmill-detach": "true"}
        )
        with stream as answer:
            return answer.headers["x-promptmill-job-id"]


def events(gateway: RunningGateway, path: str, key: str | None = None) -> list[Any]:
    with httpx.stream("GET", f"{gateway.url}/console/{path}", headers=_headers(key), timeout=30) as answer:
        assert answer.status_code == 200
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line.startswith("data: ")]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def fail(worker: FakeWorker) -> None:
    job = worker.claim().begin()
    job.write("so far", finish_reason="error")
    job.end("failed", error=ErrorInfo(code=ErrorCode.ENGINE_ERROR, message="out of luck"))
    worker.connection.zadd(f"rq:failed:{job.queue}", {job.job_id: time.time() + 3600})


def test_without_a_key_on_loopback_everything_is_seen(gateway: RunningGateway, worker: FakeWorker) -> None:
    session = ask(gateway, "session")
    assert (session["scope"], session["is_operator"], session["key_id"]) == ("all", True, None)
    with Client(worker_url(worker)) as client:  # jobs of other producers, too
        job = client.submit("Hello\n<b>you</b>", max_tokens=5, metadata={"order": 7})
    [row] = ask(gateway, "jobs", state="waiting")["jobs"]
    assert (row["id"], row["status"], row["queue"]) == (job.id, "queued", "promptmill")
    assert row["description"] == "Hello\\n<b>you</b>" and row["enqueued_at"] == pytest.approx(time.time(), abs=10)
    held = worker.claim().begin()
    assert ids(gateway, "running") == [job.id] and ids(gateway, "waiting") == []
    held.timings = Timings(queued=0.5, first_token=1.5, total=2.5)
    held.write("Hi", finish_reason="stop")
    held.end()
    wait_until(lambda: ids(gateway, "ended"))
    [row] = ask(gateway, "jobs", state="ended")["jobs"]
    assert (row["status"], row["output_tokens"], row["first_token_seconds"], row["attempts"]) == ("finished", 2, 1.5, 1)
    detail = ask(gateway, f"jobs/{job.id}")
    assert detail["request"] == {"prompt": "Hello\n<b>you</b>", "max_tokens": 5} and detail["metadata"] == {"order": 7}
    assert detail["usage"]["completion_tokens"] == 2 and detail["job"]["total_seconds"] == 2.5


def worker_url(worker: FakeWorker) -> str:
    options = worker.connection.connection_pool.connection_kwargs
    return f"redis://{options['host']}:{options['port']}"


def test_a_stream_is_read_from_a_cursor_on_and_tells_a_reset(gateway: RunningGateway, worker: FakeWorker) -> None:
    job_id = start(gateway, "x")
    first = worker.claim().begin()
    first.write("void")
    first.hand_over()
    second = worker.claim().begin(reset=True)
    second.write("ab")
    second.write("cd", finish_reason="stop")
    second.end()
    told = events(gateway, f"jobs/{job_id}/stream")
    assert [event.get("text") for event in told[:2]] == ["ab", "cd"] and told[-1] == "[DONE]"
    assert told[1]["finish_reason"] == "stop" and told[1]["num_tokens"] == 2 and told[2]["usage"]["total_tokens"] == 6
    rest = events(gateway, f"jobs/{job_id}/stream?after={told[0]['cursor']}")
    assert [event["text"] for event in rest[:-2]] == ["cd"]
    voided = events(gateway, f"jobs/{job_id}/stream?after=1-1")
    assert voided[0]["reset"] is True and [event.get("text") for event in voided[1:3]] == ["ab", "cd"]


def test_a_failed_job_is_listed_with_its_reason_and_put_back(gateway: RunningGateway, worker: FakeWorker) -> None:
    job_id = start(gateway, "x")
    fail(worker)
    [row] = ask(gateway, "jobs", state="failed")["jobs"]
    assert row["error"]["message"] == "out of luck" and row["error"]["code"] == "engine_error"
    assert events(gateway, f"jobs/{job_id}/stream")[-1]["error"]["message"] == "out of luck"
    assert do(gateway, "retry", [job_id, "nobody"]) == [(job_id, True), ("nobody", False)]
    assert ids(gateway, "failed") == [] and ids(gateway, "waiting") == [job_id]
    assert do(gateway, "retry", [job_id]) == [(job_id, False)]
    row = ask(gateway, f"jobs/{job_id}")["job"]
    assert (row["status"], row["error"], row["ended_at"]) == ("queued", None, None), "its last end is void"


def test_a_job_whose_result_cannot_be_read_is_shown_with_that(
    gateway: RunningGateway, worker: FakeWorker, redis_url: str
) -> None:
    with Client(redis_url) as client:
        job = client.submit("odd")
    echo(worker.claim())
    worker.connection.set(keys.result_key(job.id), b'{"v": 2}')
    assert ask(gateway, f"jobs/{job.id}")["job"]["error"]["code"] == "result_store_error"


def test_jobs_are_cancelled_whoever_enqueued_them(gateway: RunningGateway, worker: FakeWorker) -> None:
    with Client(worker_url(worker)) as client:
        running, waiting = client.submit("a"), client.submit("b")
    held = worker.claim().begin()
    assert do(gateway, "cancel", [running.id, waiting.id]) == [(running.id, True), (waiting.id, True)]
    assert held.is_cancelled()
    held.end("cancelled")
    wait_until(lambda: set(ids(gateway, "ended")) == {running.id, waiting.id})
    assert do(gateway, "cancel", ["nobody"]) == [("nobody", False)]


def test_a_key_sees_and_touches_its_own_jobs_alone(
    redis_url: str, start_gateway: StartGateway, worker: FakeWorker
) -> None:
    mine, other = (new_key(redis_url, name) for name in ("mine", "other"))
    operator = new_key(redis_url, "ops", "--operator")
    gateway = start_gateway()
    job_id = start(gateway, "x", mine)
    with Client(redis_url) as client:
        foreign = client.submit("y")
    session = ask(gateway, "session", mine)
    assert (session["key_name"], session["scope"], session["is_operator"]) == ("mine", "own", False)
    assert ids(gateway, "waiting", mine) == [job_id] and ids(gateway, "waiting", other) == []
    assert ids(gateway, "waiting", operator) == [job_id, foreign.id]

    def status(path: str, key: str) -> int:
        return httpx.get(f"{gateway.url}/console/{path}", headers=_headers(key)).status_code

    for path in (f"jobs/{job_id}", f"jobs/{job_id}/stream?after=9-9"):
        assert status(path, other) == 404
    assert [status(f"jobs/{job_id}", key) for key in (mine, operator)] == [200, 200]
    assert [status(f"jobs/{foreign.id}", key) for key in (mine, operator)] == [404, 200]
    assert [status("series", key) for key in (mine, operator)] == [403, 200]
    fail(worker)
    assert (
        ids(gateway, "failed", mine) == [job_id] == ids(gateway, "ended", mine) and ids(gateway, "failed", other) == []
    )
    assert do(gateway, "retry", [job_id], other) == [(job_id, False)]
    assert do(gateway, "retry", [job_id], mine) == [(job_id, True)]
    assert do(gateway, "cancel", [job_id], other) == [(job_id, False)]
    assert do(gateway, "cancel", [job_id, foreign.id], mine) == [(job_id, True), (foreign.id, False)]


def test_whoever_has_no_key_is_shown_no_list_where_there_are_keys(redis_url: str, start_gateway: StartGateway) -> None:
    new_key(redis_url, "mine")
    with running_gateway(redis_url) as closed:
        assert httpx.get(f"{closed.url}/console/session").status_code == 401
    shown = ask(start_gateway(allow_anonymous=True), "jobs")
    assert shown == {"scope": "none", "jobs": []}


def line(job_id: str, **fields: Any) -> dict[FieldT, EncodableT]:
    usage = Usage(prompt_tokens=10, completion_tokens=30, total_tokens=40)
    result = Result(job_id=job_id, status="finished", usage=usage, **fields)
    return {keys.DATA_FIELD: result.to_wire()}


def test_the_last_hour_is_read_at_the_start_and_followed(
    start_gateway: StartGateway, redis_client: redis.Redis
) -> None:
    now = int(time.time()) // 60 * 60
    timings = Timings(queued=1.0, first_token=2.0, total=4.0)
    for at, minute in enumerate((70, 50, 50, 10)):
        entry_id = f"{(now - minute * 60) * 1000 + at}-0"
        redis_client.xadd(keys.results_channel("promptmill"), line(f"{minute}-{at}", timings=timings), id=entry_id)
    redis_client.xadd(keys.results_channel("promptmill"), {"d": "no result"})
    redis_client.sadd("rq:queues", "rq:queue:promptmill@acme")
    redis_client.rpush("rq:queue:promptmill@acme", "waits")
    gateway = start_gateway()
    wait_until(lambda: ask(gateway, "series")["is_complete"])
    series = ask(gateway, "series", step=60)
    counted = {series["begin"] + 60 * at - now: point["finished"] for at, point in enumerate(series["points"])}
    assert {at: number for at, number in counted.items() if number} == {-3000: 2, -600: 1}
    assert series["window"]["output_tokens"] == 90 and series["window"]["total_p95"] == pytest.approx(4.0, rel=0.03)
    redis_client.xadd(keys.results_channel("promptmill@acme"), line("late"))
    wait_until(lambda: "late" in ids(gateway, "ended"))
    assert ids(gateway, "ended")[-1] == "50-1", "what ended before the hour is not shown"
    assert ask(gateway, "series", queue="promptmill@acme", step=600)["window"]["finished"] in (0, 1)


@pytest.mark.parametrize(
    ("path", "param"),
    [
        ("series?step=7", "step"),
        ("series?step=abc", "step"),
        ("jobs?state=asleep", "state"),
        ("jobs?limit=0", "limit"),
        ("jobs?limit=201", "limit"),
        ("jobs/x/stream?after=now", "after"),
    ],
)
def test_a_wrong_parameter_is_named(gateway: RunningGateway, path: str, param: str) -> None:
    answer = httpx.get(f"{gateway.url}/console/{path}")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize("body", [{}, {"job_ids": []}, {"job_ids": [7]}, {"job_ids": ["a"] * 101}, {"jobs": ["a"]}])
def test_a_wrong_body_is_refused_with_the_field(gateway: RunningGateway, body: dict[str, Any]) -> None:
    answer = httpx.post(f"{gateway.url}/console/jobs/retry", json=body)
    assert answer.status_code == 400 and answer.json()["error"]["param"]


def test_a_form_of_another_site_retries_nothing(gateway: RunningGateway) -> None:
    answer = httpx.post(f"{gateway.url}/console/jobs/retry", content=b'{"job_ids":["a"]}')
    assert answer.status_code == 415


def test_a_gateway_without_a_console_has_the_api_alone(start_gateway: StartGateway, worker: FakeWorker) -> None:
    gateway = start_gateway(console=False)
    assert [httpx.get(f"{gateway.url}{path}").status_code for path in ("/", "/console/session")] == [404, 404]
    with open_client(gateway) as client:
        assert [model.id for model in client.models.list()] == ["fake"]


def test_redis_away_is_said_so() -> None:
    with running_gateway("redis://127.0.0.1:1") as gateway:
        answer = httpx.get(f"{gateway.url}/console/session", timeout=30)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "queue_unavailable")
        assert httpx.get(f"{gateway.url}/").status_code == 200, "the page is there to say so"
        with pytest.raises(openai.InternalServerError), open_client(gateway) as client:
            client.models.list()
