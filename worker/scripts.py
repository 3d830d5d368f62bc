"""The worker's Lua scripts (`lua/`), and nothing else: what is one step for all who look on.

The scripts build key names from ids, so they need one Redis node (RQ does, too). Leases run by Redis TIME, never by a
worker's clock. None of them writes twice when it is sent twice.
"""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import redis
from redis.client import Pipeline

from producer.contract import keys
from producer.contract.turns import TURNS_SCRIPT
from producer.rq_names import REGISTRIES, RQ_PREFIX, format_time, ready_key, registry_key

RESUME_FIELD = "promptmill_resume"
"""Field of RQ's job hash: the `enqueued_at` of a job that the sweeper or a hand-over put back. While it still equals
`enqueued_at`, the job comes from us; any other arrival (Retry, Repeat, requeue) rewrites `enqueued_at`."""

CRASHES_FIELD = "promptmill_crashes"
"""Field of RQ's job hash, `IN_A_ROW:ALL`: attempts that ended because their worker died, in a row without a new token,
and altogether. A job that starts over starts without them."""

BLAMED_FIELD = "promptmill_blamed"
"""Field of RQ's job hash: the attempts that `IN_A_ROW` counts, each with a space behind it. One whose worker turns out
to live, and to have been cut off from Redis, is taken out again."""

CLAIMED_FIELD = "promptmill_claimed"
"""Field of RQ's job hash: a worker has claimed this very job. Where one was deleted while it ran, and another has taken
its id, the hash is new and has no such field: what is held of the old one is not the new one's."""

CLAIM_TTL_SECONDS = 60  # how long a claim can be replayed by its request id
RECORD_TTL_SECONDS = keys.WAITING_STREAM_TTL_SECONDS
"""Executions and wip are kept that long, too: no stock clean-up may fail a job that can be resumed."""


class EndCommit(NamedTuple):
    """A job's outcome in RQ and for its clients, which is to take effect together with its `done` entry."""

    dependents_key: str
    """While other jobs wait for this one, nothing is written."""
    commands: Sequence[Sequence[Any]]


class Append(NamedTuple):
    """What one job's stream gets."""

    key: str
    fence_key: str
    fence: str
    """Who may write. Entry ids alone do not tell two attempts apart if Redis lost the claim of the first."""
    expected_id: str
    """The stream's last entry as the writer knows it; empty only for a marker, which must be newer than everything
    stored."""
    entries: Sequence[str]
    """Flat: id, JSON, id, and so on. An attempt's first is its marker, which makes the stream live again (no TTL)."""
    publish: bool
    is_end: bool = False
    """Whether the last entry is the `done` entry, which starts the stream's expiry."""
    commit: EndCommit | None = None
    record_key: str | None = None
    """RQ's record of the job: while it is cancelled, gone or another job's, nothing is written."""


class Scripts:
    """Each method is one round trip. Pipelines may be passed as `client`."""

    def __init__(self) -> None:
        no_client = redis.Redis()  # registering needs one and connects nowhere; calls bring their own
        shared = TURNS_SCRIPT + _names() + _source("prelude")
        self._claim = no_client.register_script(shared + _source("claim"))
        self._beat = no_client.register_script(shared + _source("beat"))
        self._hand_over = no_client.register_script(shared + _source("hand_over"))
        self._sweep = no_client.register_script(shared + _source("sweep"))
        self._append = no_client.register_script(_source("append"))
        self._join_turns = no_client.register_script(shared + _source("join_turns"))
        self._list_queues = no_client.register_script(shared + _source("list_queues"))

    def claim(
        self,
        client: redis.Redis,
        *,
        request_id: str,
        worker: str,
        queues: Sequence[str],
        tenant_queues: Sequence[str] = (),
        max_jobs: int,
        lease_seconds: float,
        tenant_limit: int | None = None,
        tenant_limits: Mapping[str, int] | None = None,
    ) -> list[Any] | None:
        """Take up to `max_jobs` jobs, `queues` in their order, each in turn with its tenants' queues. None while RQ is
        suspended. A tenant with as many leases as its limit (`tenant_limits`, else `tenant_limit`) is passed over.
        `tenant_queues` take turns from now on if they have jobs waiting, as in `join_turns`.

        Returns `[claims, dropped]`: a claim is `[job id, queue, attempt, execution id, resumable, HGETALL of the
        job]`, dropped is `[job id, why]`. A call with the same `request_id` returns the same claims;
        execution ids begin with it.
        """
        arguments: list[str | float] = [
            request_id,
            worker,
            lease_seconds,
            RECORD_TTL_SECONDS,
            format_time(time.time()),
            CLAIM_TTL_SECONDS,
            max_jobs,
            tenant_limit or "",
            json.dumps(dict(tenant_limits or {})),
            len(tenant_queues),
        ]
        reply = self._claim(
            keys=[claim_key(worker)],
            args=[*arguments, *tenant_queues, *queues],
            client=client,
        )
        return None if reply == b"suspended" else list(reply)

    def forget_claim(self, client: redis.Redis, *, worker: str) -> None:
        """No claim of this worker will be asked for again."""
        client.delete(claim_key(worker))

    def beat(
        self,
        client: redis.Redis | Pipeline,
        *,
        worker: str,
        entry_seconds: float,
        lease_seconds: float,
        models: Sequence[str],
        jobs: Sequence[str],
        was_away: bool = False,
    ) -> Any:
        """List the worker as alive for `entry_seconds` and its `models` as served, and renew leases; all by Redis'
        clock. `jobs` is flat: queue, job id, fence, `1` if its commit is under way, and so on. A commit watches RQ's
        record of the job, which is left alone meanwhile.

        Returns one entry a job: `lost` if the fence is another's, else RQ's status of the job, empty if it is gone.
        `was_away`: since the last beat Redis was, for this worker at least. Then jobs that it lost do not count as
        crashed with it, whatever a sweeper took it for.
        """
        arguments: list[str | float] = [lease_seconds, format_time(time.time()), "1" if was_away else "0"]
        arguments += [worker, entry_seconds, RECORD_TTL_SECONDS, keys.MODEL_TTL_SECONDS, len(models)]
        return self._beat(args=[*arguments, *models, *jobs], client=client)

    def hand_over(self, client: redis.Redis | Pipeline, *, jobs: Sequence[str], resumable: bool) -> Any:
        """Put running jobs back to the front of their queues, under their fences. `jobs` is flat: queue, job id, fence,
        and so on, the oldest claim first. Those not `resumable` start over. Returns the ids that were put back."""
        return self._hand_over(args=["1" if resumable else "0", RECORD_TTL_SECONDS, *jobs], client=client)

    def sweep(
        self, client: redis.Redis | Pipeline, *, queue: str, lease_seconds: float, max_jobs: int, execution_id: str
    ) -> Any:
        """Put jobs whose lease has ended back to the front of `queue` or its tenant's queue, at most `max_jobs` each.

        Returns `[ids put back, orphans]`. An orphan was cancelled or deleted while its worker died: it is leased to
        the caller, who owes it an outcome, and has the form of a claim. Its execution id begins with `execution_id`.
        """
        arguments: list[str | float] = [queue, lease_seconds, RECORD_TTL_SECONDS, max_jobs, execution_id]
        return self._sweep(args=arguments, client=client)

    def join_turns(self, client: redis.Redis, *, queues: Sequence[str]) -> None:
        """Those of the tenants' `queues` that have jobs waiting take turns from now on, if they did not before."""
        self._join_turns(args=list(queues), client=client)

    def list_queues(self, client: redis.Redis, *, queues: Sequence[str]) -> list[str]:
        """Those of the tenants' `queues` that hold nothing go off RQ's list of queues, and the others onto it.

        Returns the idle ones. RQ puts a queue on the list and the job onto the queue in two steps: whoever takes one
        off has to look once more.
        """
        idle = self._list_queues(args=[keys.RESULT_TTL_SECONDS, *queues], client=client)
        return [name.decode() for name in idle]

    def append(self, client: redis.Redis | Pipeline, appends: Sequence[Append]) -> Any:
        """Append to jobs' streams and publish what was stored. One reply an append, in order.

        Nothing is written to a stream that does not end as its writer expects; the reply is the stored last id (or
        empty). It is `fenced` where the fence is another's, `contested` where RQ's record or the dependents say no, and
        an exception of redis-py's where Redis refused. Where all was written it is `OK`, and behind that what Redis had
        against single commands of the commit.

        Raises NoScriptError until `load_append` was called for this server: a pipeline that knew scripts would ask for
        them before each of the worker's most frequent round trips.
        """
        arguments: list[str | int] = [keys.STREAM_TTL_SECONDS]
        for append in appends:
            flags = ("p" if append.publish else "") + ("e" if append.is_end else "") + ("c" if append.commit else "")
            arguments += (append.fence, append.expected_id)
            if append.record_key is not None:
                arguments += (flags + "rn", len(append.entries) // 2, append.record_key, *append.entries)
            elif len(append.entries) == 2:
                arguments += (flags, *append.entries)
            else:
                arguments += (flags + "n", len(append.entries) // 2, *append.entries)
            if append.commit is not None:
                arguments += _commit_arguments(append.commit)
        names = [append.key for append in appends] + [append.fence_key for append in appends]
        return client.evalsha(self._append.sha, len(names), *names, *arguments)

    def load_append(self, client: redis.Redis) -> None:
        client.script_load(self._append.script)


def _commit_arguments(commit: EndCommit) -> list[Any]:
    commands = [part for command in commit.commands for part in (len(command), *command)]
    return [1 + len(commands), commit.dependents_key, *commands]


def claim_key(worker: str) -> str:
    """What a worker's last claim returned, so that a lost reply does not lose the jobs."""
    return f"promptmill:claim:{worker}"


def _source(name: str) -> str:
    return (Path(__file__).parent / "lua" / f"{name}.lua").read_text(encoding="utf-8")


def _names() -> str:
    """Lua's names for what key names begin with."""
    stream, stream_end = keys.stream_key("@").split("@")
    names = {
        "RQ": RQ_PREFIX,
        "WORKERS": keys.WORKERS_KEY,
        "MODELS": keys.MODELS_KEY,
        "LEASES": keys.leases_key(""),
        "LEASED": keys.leased_key(""),
        "FREED": keys.freed_channel(""),
        "TURNS": keys.turns_key(""),
        "RESULTS": keys.results_channel(""),
        "FENCE": keys.fence_key(""),
        "ATTEMPT": keys.attempt_key(""),
        "STREAM": stream,
        "STREAM_END": stream_end,
        "RESUME_FIELD": RESUME_FIELD,
        "CRASHES_FIELD": CRASHES_FIELD,
        "BLAMED_FIELD": BLAMED_FIELD,
        "CLAIMED_FIELD": CLAIMED_FIELD,
    }
    prefixes = {name: registry_key(name, "") for name in REGISTRIES}
    names["CANCELLED"] = prefixes.pop("cancelled")
    registries = ", ".join(f"'{prefix}'" for prefix in (*prefixes.values(), ready_key("")))
    lines = [*(f"local {name} = '{value}'" for name, value in names.items()), f"local REGISTRIES = {{{registries}}}"]
    return "\n".join(lines) + "\n"
