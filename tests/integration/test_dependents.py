"""Jobs that wait for one that failed, was cancelled or is forgotten: seen, and ended."""

import json
from typing import Any

import redis

from producer import AsyncClient, Client
from producer.contract import keys
from tests.fakes.command_line import Invoke
from tests.fakes.waiting import wait_until
from tests.fakes.worker_runs import WorkerThread

REFUSED: dict[str, Any] = {"max_tokens": 10**6}  # more than any model takes


def test_who_waits_in_vain_is_seen_and_ended(
    client: Client, redis_url: str, redis_client: redis.Redis, promptmill: Invoke
) -> None:
    with WorkerThread(redis_url):
        failed, sound = client.submit("a", **REFUSED), client.submit("b", max_tokens=2)
        child = client.submit("c", max_tokens=2, depends_on=[failed, sound])
        grandchild, other = (client.submit("d", max_tokens=2, depends_on=[child]) for _ in range(2))
        wait_until(lambda: failed.status().has_ended and sound.status().has_ended)
        listed = promptmill("deferred").stdout.splitlines()
        assert f"{child.id}  promptmill  waits for {failed.id} (failed)" in listed
        shown = {job["job_id"]: job for job in map(json.loads, promptmill("deferred", "--json").stdout.splitlines())}
        assert shown[grandchild.id]["waits_for"] == {child.id: "waiting"} and len(shown) == 3
        assert len(client.deferred(limit=1)) == 1
        assert "deferred" in promptmill("status").stdout
        ended = promptmill("cancel", "--dependents", failed.id)
        assert ended.exit_code == 1 and f"{failed.id} had ended before" in ended.stdout
        assert ended.stdout.splitlines()[0] == f"{child.id} cancelled"
        assert {job.result(timeout=20).status for job in (child, grandchild, other)} == {"cancelled"}
        assert promptmill("deferred").stdout == "no job waits for another\n"
        assert "deferred" not in promptmill("status").stdout
        assert redis_client.xlen(keys.results_channel(keys.DEFAULT_QUEUE)) == 5


async def test_who_waits_for_a_job_that_is_forgotten_can_be_told_and_cancelled(
    redis_url: str, redis_client: redis.Redis
) -> None:
    async with AsyncClient(redis_url) as client:
        first = await client.submit("a")
        second = await client.submit("b", depends_on=[first])
        third = await client.submit("c", depends_on=[second])
        redis_client.delete(f"rq:job:{first.id}", f"rq:job:{first.id}:dependents")  # it has expired
        waiting = {job.job_id: job.waits_for for job in await client.deferred()}
        assert waiting == {second.id: {first.id: None}, third.id: {second.id: "waiting"}}
        assert await client.cancel_dependents(second) == [third.id]
        assert await client.cancel(second) and await client.deferred() == []


def test_a_job_that_others_wait_for_is_cancelled_with_them(client: Client, redis_url: str, promptmill: Invoke) -> None:
    first = client.submit("a", max_tokens=2)
    second = client.submit("b", max_tokens=2, depends_on=[first])
    ended = promptmill("cancel", "--dependents", first.id)
    assert (ended.exit_code, ended.stdout) == (0, f"{second.id} cancelled\n{first.id} cancelled\n")


def test_who_cancels_them_once_more_ends_what_was_left_when_the_first_time_broke_off(client: Client) -> None:
    first = client.submit("a")
    second = client.submit("b", depends_on=[first])
    third = client.submit("c", depends_on=[second])
    assert client.cancel(second)  # and no more: whoever did it died
    assert client.cancel_dependents(first) == [third.id]
    assert client.deferred() == []


def test_jobs_that_many_wait_for_are_looked_at_once(client: Client, redis_client: redis.Redis) -> None:
    """Else each layer of such jobs would take as long as all before it, times its jobs."""
    first = client.submit("a")
    ids, layer = [], [first]
    for _ in range(3):
        layer = [client.submit("b", depends_on=layer) for _ in range(3)]
        ids += sorted(job.id for job in layer)
    redis_client.config_resetstat()
    assert sorted(client.cancel_dependents(first)) == sorted(ids)
    assert redis_client.info("commandstats")["cmdstat_smembers"]["calls"] == 1 + len(ids)
