"""Tenants and priority classes as queues: whose job is claimed next, and how many of whose run at once."""

import time
from collections import Counter

import pytest
import redis

from producer import Client, InvalidJobError
from producer.contract import keys
from producer.enqueue import PriorityClass
from producer.rq_names import REGISTRIES, ready_key, registry_key
from tests.fakes.redis_reads import set_names, sorted_set_names
from tests.fakes.waiting import wait_until
from tests.fakes.worker_runs import (
    FUNCTION,
    WorkerThread,
    enqueue_many,
    leftovers,
    rq_queue,
    wait_for_no_leftovers,
    wait_for_result,
)
from worker.claim import Claim
from worker.recovery import give_back
from worker.scripts import Scripts
from worker.tenant_queues import LOOK_AGAIN_SECONDS, TenantQueues

QUEUES = keys.class_queues(keys.DEFAULT_QUEUE)
ACME = keys.tenant_queue(keys.DEFAULT_QUEUE, "acme")


@pytest.fixture
def scripts() -> Scripts:
    return Scripts()


class Claimer:
    """Claims as one worker after another would."""

    def __init__(self, client: redis.Redis, scripts: Scripts) -> None:
        self._client = client
        self._scripts = scripts
        self._num_calls = 0

    def claim(self, max_jobs: int, *, worker: str = "w", **limits: object) -> list[Claim]:
        self._num_calls += 1
        reply = self._scripts.claim(
            self._client,
            request_id=f"request{self._num_calls}",
            worker=worker,
            queues=QUEUES,
            max_jobs=max_jobs,
            lease_seconds=30.0,
            **limits,  # type: ignore[arg-type]
        )
        assert reply is not None
        return [Claim.parse(entry, time.time()) for entry in reply[0]]

    def names(self, max_jobs: int, *, worker: str = "w", **limits: object) -> list[str]:
        """The claimed jobs' queues, without the part that all share."""
        claims = self.claim(max_jobs, worker=worker, **limits)
        return [claim.queue.removeprefix(keys.DEFAULT_QUEUE) for claim in claims]


@pytest.fixture
def claimer(redis_client: redis.Redis, scripts: Scripts) -> Claimer:
    return Claimer(redis_client, scripts)


@pytest.fixture
def client(redis_url: str) -> Client:
    return Client(redis_url)


def submit(client: Client, number: int, tenant: str | None = None, **options: object) -> list[str]:
    requests = [{"prompt": f"Job {at}", "max_tokens": 4, "tenant": tenant} for at in range(number)]
    return [job.id for job in client.submit_many(requests, **options)]  # type: ignore[arg-type]


def end_leases(client: redis.Redis, queue: str) -> None:
    for job_id in sorted_set_names(client, keys.leases_key(queue)):
        client.zadd(keys.leases_key(queue), {job_id: 1})


def test_tenants_take_turns_with_each_other_and_with_jobs_that_are_nobodys(client: Client, claimer: Claimer) -> None:
    submit(client, 5, "big")
    submit(client, 2, "small")
    submit(client, 3)
    assert claimer.names(10) == ["@big", "@small", "", "@big", "@small", "", "@big", "", "@big", "@big"]


def test_turns_go_on_where_another_worker_left_them(client: Client, claimer: Claimer) -> None:
    for tenant in ("a", "b", "c"):
        submit(client, 4, tenant)
    names = [name for at in range(12) for name in claimer.names(1, worker=f"w{at % 3}")]
    assert names == ["@a", "@b", "@c"] * 4


def test_a_tenant_that_comes_late_waits_for_one_job_of_each_other_at_most(client: Client, claimer: Claimer) -> None:
    submit(client, 1000, "big")
    submit(client, 1000, "bigger")
    claimer.claim(64)
    submit(client, 10, "small")
    assert claimer.names(30).count("@small") == 10


def test_each_tenants_jobs_keep_their_order(client: Client, claimer: Claimer) -> None:
    first, second = submit(client, 5, "a"), submit(client, 5, "b")
    claims = [claim.job_id for claim in claimer.claim(10)]
    assert claims[::2] == first and claims[1::2] == second


def test_a_class_comes_before_the_next_whoever_waits_there(client: Client, claimer: Claimer) -> None:
    submit(client, 2, "a", priority_class="low")
    submit(client, 2, "a")
    submit(client, 2, "b", priority_class="high")
    submit(client, 1, priority_class="high")
    assert claimer.names(10) == [":high@b", ":high", ":high@b", "@a", "@a", ":low@a", ":low@a"]


def test_a_tenant_at_its_limit_is_passed_over_until_a_job_of_its_ends(
    client: Client, claimer: Claimer, redis_client: redis.Redis, scripts: Scripts
) -> None:
    submit(client, 10, "big")
    submit(client, 1, "big", priority_class="high")
    submit(client, 3, "small")
    claims = claimer.claim(4, tenant_limit=3)
    assert [claim.queue for claim in claims] == [
        "promptmill:high@big",
        "promptmill@big",
        "promptmill@small",
        "promptmill@big",
    ]
    assert claimer.names(10, worker="other", tenant_limit=3) == ["@small", "@small"]
    assert claimer.claim(10, tenant_limit=3) == []
    give_back(redis_client, scripts, claims[:1])
    assert claimer.names(10, tenant_limit=3) == [":high@big"]


def test_a_tenants_own_limit_wins_over_the_general_one(client: Client, claimer: Claimer) -> None:
    for tenant in ("big", "small", "other"):
        submit(client, 10, tenant)
    submit(client, 10)
    names = Counter(claimer.names(40, tenant_limit=2, tenant_limits={"big": 5, "small": 1}))
    assert names == {"@big": 5, "@small": 1, "@other": 2, "": 10}


def test_expired_leases_of_tenants_are_swept_to_the_front_of_their_queues(
    client: Client, claimer: Claimer, redis_client: redis.Redis, scripts: Scripts
) -> None:
    ids = submit(client, 6, "acme")
    claimer.claim(4)
    end_leases(redis_client, ACME)
    sweep = {"queue": keys.DEFAULT_QUEUE, "lease_seconds": 30, "max_jobs": 100, "execution_id": "s"}
    returned, _ = scripts.sweep(redis_client, **sweep)  # type: ignore[arg-type]
    assert {job_id.decode() for job_id in returned} == set(ids[:4])
    assert rq_queue(redis_client, ACME).get_job_ids() == ids
    assert [key for key in leftovers(redis_client) if "attempt" not in key] == []
    scripts.sweep(redis_client, **sweep)  # type: ignore[arg-type]
    assert not redis_client.exists(keys.leased_key(keys.DEFAULT_QUEUE))
    assert [claim.job_id for claim in claimer.claim(10)] == ids


def test_queues_that_plain_rq_filled_take_turns_after_one_look(
    claimer: Claimer, redis_client: redis.Redis, scripts: Scripts
) -> None:
    enqueue_many(rq_queue(redis_client, ACME), 2)
    enqueue_many(rq_queue(redis_client, "promptmill:high@zeta"), 1)
    enqueue_many(rq_queue(redis_client, "foreign@acme"), 1)
    tenants = TenantQueues(redis_client, scripts, queues=QUEUES)
    tenants.look(100.0)
    assert tenants.names == ["promptmill:high@zeta", ACME]
    assert claimer.names(10) == [":high@zeta", "@acme", "@acme"]


def test_queues_that_hold_nothing_are_no_longer_looked_at(redis_client: redis.Redis, scripts: Scripts) -> None:
    held = {"list": "rq:queue:", "ready": ready_key(""), **{name: registry_key(name, "") for name in REGISTRIES}}
    held |= {"leases": keys.leases_key(""), "results": keys.results_channel("")}
    for tenant, prefix in held.items():
        if tenant == "list":
            redis_client.rpush(f"{prefix}promptmill@{tenant}", "job")
        else:
            redis_client.zadd(f"{prefix}promptmill@{tenant}", {"job": time.time()})
    redis_client.zadd("rq:canceled:promptmill@past", {"job": time.time() - keys.RESULT_TTL_SECONDS - 1})
    tenants = TenantQueues(redis_client, scripts, queues=QUEUES)
    for tenant in (*held, "past", "late", "gone"):
        redis_client.sadd("rq:queues", f"rq:queue:promptmill@{tenant}")
    tenants.look(100.0)
    tenants.forget_idle(100.0)
    assert queues_of(redis_client) == {*held} and len(tenants.names) == len(held)
    redis_client.rpush("rq:queue:promptmill@late", "job")  # RQ had put it on the list before
    redis_client.delete("promptmill:discovery")
    tenants.look(100.0 + LOOK_AGAIN_SECONDS)
    assert queues_of(redis_client) == {*held, "late"}
    assert "promptmill@late" in tenants.names and len(tenants.names) == len(held) + 1


def queues_of(client: redis.Redis) -> set[str]:
    """Tenants of promptmill whose queues RQ lists."""
    return {name.rpartition("@")[2] for name in set_names(client, "rq:queues")}


def test_one_worker_a_second_looks_for_tenants(redis_client: redis.Redis, scripts: Scripts) -> None:
    first, second = (TenantQueues(redis_client, scripts, queues=QUEUES) for _ in range(2))
    first.look(100.0)
    redis_client.persist("promptmill:discovery")  # however long the rest takes
    second.look(100.0)
    enqueue_many(rq_queue(redis_client, ACME), 1)
    second.look(101.0)
    assert second.names == []
    redis_client.delete("promptmill:discovery")
    second.look(102.0)
    assert second.names == [ACME] and redis_client.zrange(keys.turns_key(keys.DEFAULT_QUEUE), 0, -1) == [ACME.encode()]


def test_jobs_of_tenants_run_whoever_enqueued_them(redis_url: str, redis_client: redis.Redis, client: Client) -> None:
    with WorkerThread(redis_url, max_running_per_tenant=2, lease_seconds=2) as worker:  # the first sweep comes sooner
        ours = submit(client, 5, "acme")
        plain = enqueue_many(rq_queue(redis_client, "promptmill:low@zeta"), 5, max_tokens=4)
        retried = rq_queue(redis_client, ACME).enqueue(FUNCTION, prompt="Hi", max_tokens=4)
        results = [wait_for_result(redis_client, job_id) for job_id in [*ours, *plain, retried.id]]
        assert {result.status for result in results} == {"finished"}
        wait_for_no_leftovers(redis_client)
        wait_until(lambda: not redis_client.keys("promptmill:leased:*"))
        assert len(worker.engine.submitted) == 11
    assert set(sorted_set_names(redis_client, f"rq:finished:{ACME}")) == {*ours, retried.id}
    assert redis_client.xlen(keys.results_channel(ACME)) == 6 and not redis_client.keys("promptmill:turns:*")


def test_a_tenants_first_job_is_found_when_plain_rq_made_it_wait(redis_url: str, redis_client: redis.Redis) -> None:
    first = rq_queue(redis_client).enqueue(FUNCTION, prompt="One", max_tokens=4)
    last = rq_queue(redis_client, ACME).enqueue(FUNCTION, prompt="Two", max_tokens=4, depends_on=first)
    with WorkerThread(redis_url):
        assert wait_for_result(redis_client, last.id).status == "finished"


def test_no_more_jobs_of_a_tenant_run_than_its_limit_over_all_workers(redis_url: str, client: Client) -> None:
    with (
        WorkerThread(redis_url, max_running_per_tenant=3) as one,
        WorkerThread(redis_url, max_running_per_tenant=3) as two,
    ):
        one.engine.pause()
        two.engine.pause()
        big, small = submit(client, 20, "big"), submit(client, 2, "small")
        wait_until(lambda: len(one.engine.running) + len(two.engine.running) == 5)
        one.engine.go_on()
        two.engine.go_on()
        assert {result.status for result in client.as_completed([*big, *small], timeout=30)} == {"finished"}


def test_hand_over_puts_a_tenants_jobs_back(redis_url: str, redis_client: redis.Redis, client: Client) -> None:
    with WorkerThread(redis_url) as worker:
        worker.engine.pause()
        ids = submit(client, 4, "acme")
        wait_until(lambda: len(worker.engine.running) == 4)
    assert rq_queue(redis_client, ACME).get_job_ids() == ids
    with WorkerThread(redis_url):
        assert [wait_for_result(redis_client, job_id).attempts for job_id in ids] == [2] * 4


def test_tenants_share_no_cached_prefixes(redis_url: str, client: Client) -> None:
    """`cached_tokens` would tell one of them what another has asked."""
    with WorkerThread(redis_url) as worker:
        callers: list[tuple[str | None, PriorityClass | None]]
        callers = [("acme", None), ("acme", "high"), ("zeta", None), (None, None)]
        for tenant, priority_class in callers:
            client.submit("Hello", max_tokens=1, tenant=tenant, priority_class=priority_class).result(timeout=30)
        assert [request.cache_key for request in worker.engine.requests] == ["acme", "acme", "zeta", ""]


@pytest.mark.parametrize(
    ("queue", "tenant", "priority_class", "expected"),
    [
        (None, "acme", None, "promptmill@acme"),
        (None, "acme", "high", "promptmill:high@acme"),
        ("other@acme", None, "low", "other:low@acme"),
        ("other@acme", "acme", None, "other@acme"),
    ],
)
def test_tenant_and_class_make_the_queue(
    client: Client, queue: str | None, tenant: str | None, priority_class: str | None, expected: str
) -> None:
    job = client.submit("Hello", queue=queue, tenant=tenant, priority_class=priority_class)  # type: ignore[arg-type]
    assert job.queue == expected


def test_a_tenant_on_another_tenants_queue_is_refused(client: Client) -> None:
    with pytest.raises(InvalidJobError, match="another tenant's") as caught:
        client.submit("Hello", queue="promptmill@zeta", tenant="acme")
    assert caught.value.param == "tenant"


def test_status_shows_tenants_queues_that_have_jobs(client: Client) -> None:
    submit(client, 3, "acme")
    submit(client, 1, "zeta", priority_class="low")
    depths = {queue.name: queue.depth for queue in client.queues()}
    assert depths == {"promptmill": 0, "promptmill:low@zeta": 1, "promptmill@acme": 3}
