"""How a stream of events ends when it ends early: who is told, who is cancelled, and that nobody writes any more."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from producer.contract import Usage
from producer.gateway.console.chunk_events import ChunkEvents
from producer.gateway.drain import Drain
from producer.gateway.errors import ApiError
from producer.gateway.event_stream import EventStream
from producer.gateway.job_stream import SendEvent
from producer.gateway.metrics import GatewayMetrics
from producer.gateway.renderer import StreamProgress

WAIT_SECONDS = 30.0
NOTHING_USED = Usage()


class PlayedStream:
    """A job's stream that does what a test says."""

    def __init__(self, play: Callable[[SendEvent], Awaitable[None]], usage: Usage | None = NOTHING_USED) -> None:
        self.copy_to = play
        self.usage = usage
        self.progress = StreamProgress("job", "1-1", None)
        self.renderer = ChunkEvents()


class PlayedJob:
    id = "job"
    is_cancelled = False

    async def cancel(self) -> None:
        self.is_cancelled = True


class PlayedClient:
    """Whoever reads: gone once `is_gone` is set. `messages`: what it was sent."""

    def __init__(self) -> None:
        self.messages: list[Any] = []
        self.is_gone = asyncio.Event()

    async def receive(self) -> Any:
        await self.is_gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.messages.append(message)
        await asyncio.sleep(0)  # as a server does: others may write meanwhile

    @property
    def events(self) -> list[bytes]:
        return [message["body"] for message in self.messages if message["type"] == "http.response.body"]


async def play(client: PlayedClient, streams: list[PlayedStream], *, seconds: float = 60.0, **options: Any) -> Drain:
    settings = SimpleNamespace(request_timeout_seconds=seconds, keep_alive_seconds=60.0)
    drain = options.pop("drain", None) or Drain(0.0)
    context = SimpleNamespace(settings=settings, drain=drain, metrics=GatewayMetrics())
    stream = EventStream(cast(Any, streams), cast(Any, context), **options)
    async with asyncio.timeout(WAIT_SECONDS):
        await stream({"type": "http"}, client.receive, client.send)
    return drain


async def write(send: SendEvent) -> None:
    await send(b"data: x\n\n")


async def write_without_end(send: SendEvent) -> None:
    while True:
        await write(send)


async def fail(send: SendEvent) -> None:
    raise ApiError(cast(Any, 400), "context_length_exceeded", "too long")


async def wait_for_ever(send: SendEvent) -> None:
    await asyncio.Event().wait()


async def test_nothing_is_written_behind_the_event_that_says_why_a_stream_ends() -> None:
    client, job = PlayedClient(), PlayedJob()
    await play(client, [PlayedStream(write_without_end)], seconds=0.05, cancels=[job])
    reason = json.loads(client.events[-2].removeprefix(b"data: "))
    assert reason["error"]["code"] == "timeout" and reason["promptmill"] == {"job_id": "job", "cursor": "1-1"}
    assert client.events[-1] == b"" and not client.messages[-1]["more_body"] and job.is_cancelled


@pytest.mark.parametrize("is_detached", [False, True])
async def test_a_stream_that_has_not_begun_in_time_is_an_error_that_nobody_is_to_repeat(is_detached: bool) -> None:
    client, job = PlayedClient(), PlayedJob()
    ours = {"x-promptmill-job-id": "job"}
    cancels = [] if is_detached else [job]
    await play(client, [PlayedStream(wait_for_ever)], seconds=0.05, cancels=cancels, headers=ours)
    headers = {name.decode(): value.decode() for name, value in client.messages[0]["headers"]}
    assert client.messages[0]["status"] == 408 and job.is_cancelled is not is_detached
    assert headers.items() >= {"x-should-retry": "false", "content-type": "application/json", **ours}.items()
    fate = "it goes on: GET /v1/jobs/job/stream?after=1-1" if is_detached else "its job was cancelled"
    assert json.loads(client.events[0])["error"]["message"].endswith(fate)


async def test_a_stream_that_is_cut_off_by_the_gateways_end_cancels_no_job() -> None:
    client, job, drain = PlayedClient(), PlayedJob(), Drain(0.0)
    drain.begin()
    await play(client, [PlayedStream(wait_for_ever)], cancels=[job], drain=drain)
    assert client.messages[0]["status"] == 503 and b"gateway_stopping" in client.events[0] and not job.is_cancelled


async def test_of_several_jobs_the_others_are_cancelled_when_one_fails() -> None:
    client, jobs = PlayedClient(), [PlayedJob(), PlayedJob()]
    await play(client, [PlayedStream(fail), PlayedStream(wait_for_ever)], cancels=jobs)
    assert client.messages[0]["status"] == 400 and all(job.is_cancelled for job in jobs)


async def test_who_leaves_cancels_all_and_is_sent_nothing_more() -> None:
    client, jobs = PlayedClient(), [PlayedJob(), PlayedJob()]
    client.is_gone.set()
    await play(client, [PlayedStream(wait_for_ever)] * 2, cancels=jobs)
    assert not client.messages and all(job.is_cancelled for job in jobs)


@pytest.mark.parametrize("end", [fail, write], ids=["failed", "whole"])
async def test_what_a_stream_used_is_told_once_whatever_becomes_of_it(
    end: Callable[[SendEvent], Awaitable[None]],
) -> None:
    told: list[Usage] = []

    async def settle(usage: Usage) -> None:
        told.append(usage)

    streams = [PlayedStream(write, Usage(total_tokens=3)), PlayedStream(end, Usage(total_tokens=4))]
    await play(PlayedClient(), streams, on_usage=settle)
    assert [usage.total_tokens for usage in told] == [7]


async def test_what_a_stream_used_is_not_told_where_one_of_its_jobs_was_not_seen_to_end() -> None:
    told: list[Usage] = []

    async def settle(usage: Usage) -> None:
        told.append(usage)

    await play(PlayedClient(), [PlayedStream(wait_for_ever, None), PlayedStream(fail)], on_usage=settle)
    assert not told


async def test_no_sign_of_life_takes_the_status_of_a_failure_that_is_being_settled() -> None:
    client = PlayedClient()
    alive: set[str] = set()

    async def settle(usage: Usage) -> None:
        alive.update(cast(Any, task.get_coro()).__name__ for task in asyncio.all_tasks())

    await play(client, [PlayedStream(fail)], on_usage=settle)
    assert client.messages[0]["status"] == 400 and EventStream._keep_alive.__name__ not in alive
