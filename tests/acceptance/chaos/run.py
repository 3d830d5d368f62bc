"""One chaos run: jobs in, faults by the schedule, everything healed, and then the verdict.

python -m tests.acceptance.chaos.run --seed 7 --minutes 5
"""

import json
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import click
import redis

from producer import Client, RedisUnavailableError
from producer.contract import Result, keys
from tests.acceptance.chaos.fleet import Fleet, Slot
from tests.acceptance.chaos.rq_monitor import RqMonitor
from tests.acceptance.chaos.schedule import Event, Fault, make_schedule
from tests.acceptance.chaos.verdict import find_problems, history, read_stream
from tests.acceptance.chaos.watchers import Watchers
from tests.acceptance.chaos.workload import ChaosJob, make_jobs
from tests.fakes.ports import free_port
from tests.fakes.redis_reads import stream_rows
from worker.embedded_redis import EmbeddedRedis

NUM_WORKERS = 3
REPLY_LOSS = 0.05  # share of the replies that a faulty connection swallows, cutting itself
MAX_HISTORIES = 3
SUPERVISION_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class ChaosConfig:
    seed: int
    num_jobs: int = 300
    max_tokens: tuple[int, int] = (5, 60)
    fault_seconds: float = 20.0
    lease_seconds: float = 3.0
    has_chat: bool = True
    end_seconds: float = 240.0
    """How long the jobs may take once the faults are over."""


@dataclass(slots=True)
class ChaosReport:
    problems: dict[str, list[str]] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    histories: list[str] = field(default_factory=list)
    figures: dict[str, object] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [json.dumps(self.figures, default=str)]
        if self.problems:
            lines += ["events:", *map(str, self.events), "problems:"]
            lines += [f"  {name}: {'; '.join(found)[:600]}" for name, found in list(self.problems.items())[:20]]
            lines += [f"{len(self.problems)} in all", *self.histories]
        return "\n".join(lines)


def run_without_faults(command: Sequence[str], jobs: Sequence[ChaosJob], log_dir: Path) -> dict[str, Result]:
    """What one worker that nothing happens to answers."""
    with EmbeddedRedis() as server, Fleet(server, command, log_dir, num_workers=1) as fleet:
        fleet.wait_until_all_serve(server.url)
        with Client(server.url) as client:
            submit(client, jobs)
            results = {result.job_id: result for result in client.as_completed([job.job_id for job in jobs], 600)}
    unfinished = [result for result in results.values() if result.status != "finished"]
    assert not unfinished, f"does not finish without faults: {unfinished[0]}"
    return results


def run_chaos(command: Sequence[str], config: ChaosConfig, log_dir: Path) -> ChaosReport:
    """`command` starts a worker; PROMPTMILL_* settings beyond the URL are in it or in the environment."""
    jobs = make_jobs(config.seed, config.num_jobs, config.max_tokens, has_chat=config.has_chat)
    quiet_dir, chaos_dir = log_dir / "quiet", log_dir / "chaos"
    quiet_dir.mkdir()
    chaos_dir.mkdir()
    reference = run_without_faults(command, jobs, quiet_dir)
    report = ChaosReport()
    with ExitStack() as stack:
        server = stack.enter_context(EmbeddedRedis(data_dir=log_dir / "redis", port=free_port(), fsync="always"))
        fleet = stack.enter_context(Fleet(server, command, chaos_dir, num_workers=NUM_WORKERS))
        connection = stack.enter_context(redis.Redis.from_url(server.url))
        fleet.wait_until_all_serve(server.url)
        monitor = stack.enter_context(RqMonitor(server.url))
        watchers = Watchers(server.url, jobs, seed=config.seed)
        watchers.start()
        producer = threading.Thread(target=produce, args=(fleet, jobs, config.fault_seconds), name="producer")
        producer.start()
        began = time.monotonic()
        hurt(fleet, config, report.events)
        heal(fleet, server)
        producer.join()
        watchers.wait(config.end_seconds)
        wait_for(lambda: not _unsettled(connection), 30)
        report.figures = _figures(connection, jobs, watchers, fleet, time.monotonic() - began)
        report.figures["rq info"] = monitor.num_looks
        report.problems = find_problems(connection, jobs, reference, watchers.seen)
        report.problems |= _fleet_problems(fleet, server.url)
        if monitor.problems or not monitor.num_looks:
            report.problems["rq info"] = monitor.problems or ["never answered"]
        named = [name for name in report.problems if name.startswith("chaos-")][:MAX_HISTORIES]
        report.histories = [history(connection, name, fleet.logs()) for name in named]
    return report


def submit(client: Client, jobs: Sequence[ChaosJob]) -> None:
    for job in jobs:
        client.submit(job_id=job.job_id, queue=job.queue, priority_class=job.priority_class, **job.fields)  # type: ignore[arg-type]


def produce(fleet: Fleet, jobs: Sequence[ChaosJob], seconds: float) -> None:
    """Spread the jobs over the faults. A producer sends again what it got no answer for, as the ids allow."""
    with Client(fleet.redis.url) as client:
        start = time.monotonic()
        for at, job in enumerate(jobs):
            pause = start + seconds * 0.8 * at / len(jobs) - time.monotonic()
            threading.Event().wait(max(0.0, pause))
            while True:
                try:
                    submit(client, [job])
                    break
                except RedisUnavailableError:
                    continue


def hurt(fleet: Fleet, config: ChaosConfig, events: list[Event]) -> None:
    """Do what the schedule says, and note it in `events`."""
    schedule = make_schedule(
        config.seed, seconds=config.fault_seconds, num_workers=len(fleet.slots), lease_seconds=config.lease_seconds
    )
    cures: list[tuple[float, Callable[[], object]]] = []
    start = time.monotonic()
    while schedule or cures:
        now = time.monotonic() - start
        cures.sort(key=lambda cure: cure[0])
        next_event = schedule[0].at_seconds if schedule else float("inf")
        next_cure = cures[0][0] if cures else float("inf")
        fleet.start_ended()
        if min(next_event, next_cure) > now:
            threading.Event().wait(min(SUPERVISION_SECONDS, min(next_event, next_cure) - now))
            continue
        if next_cure <= next_event:
            cures.pop(0)[1]()
            continue
        event = schedule.pop(0)
        events.append(event)
        if cure := strike(fleet, fleet.slots[event.slot], event):
            cures.append((event.at_seconds + event.seconds, cure))


def strike(fleet: Fleet, slot: Slot, event: Event) -> Callable[[], object] | None:
    """Let the event happen; returns what ends it. Workers that end are started again by supervision."""
    if event.fault in (Fault.KILL_PARENT, Fault.TERMINATE):
        slot.start_at = time.monotonic() + event.seconds
    match event.fault:
        case Fault.KILL_PARENT:
            fleet.kill(slot)
        case Fault.KILL_CHILD:
            fleet.kill_child(slot)
        case Fault.TERMINATE:
            fleet.terminate(slot)
        case Fault.STOP:
            fleet.stop(slot, with_child=event.seconds > 3.0)
            return lambda: fleet.wake(slot)
        case Fault.HANG_CHILD:
            fleet.hang_child(slot)
            return lambda: fleet.wake(slot)
        case Fault.CUT:
            slot.proxy.probability = REPLY_LOSS
            slot.proxy.cut_all()
            return lambda: setattr(slot.proxy, "probability", 0.0)
        case Fault.RESTART_REDIS:
            fleet.kill_redis()
            return fleet.start_redis
    return None


def heal(fleet: Fleet, server: EmbeddedRedis) -> None:
    for slot in fleet.slots:
        fleet.wake(slot)
        slot.proxy.probability = 0.0
    fleet.wait_until_all_serve(server.url)


def wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.1)
    return condition()


def _unsettled(connection: redis.Redis) -> bool:
    patterns = ("promptmill:leases:*", "promptmill:leased:*", "promptmill:turns:*", "rq:execution*", "rq:queue:*")
    return any(next(connection.scan_iter(pattern, count=1000), None) for pattern in patterns)


def _fleet_problems(fleet: Fleet, url: str) -> dict[str, list[str]]:
    """No block is used by an idle engine; workers end in good order and leave no process behind."""
    with Client(url) as client:
        wait_for(lambda: not any(info.kv_blocks_used or info.num_running for info in client.workers()), 10)
        found = [
            f"{info.name} idle with {info.kv_blocks_used} blocks, {info.num_running} running"
            for info in client.workers()
            if info.kv_blocks_used or info.num_running or info.num_waiting
        ]
    codes = fleet.shut_down()
    if any(codes):
        found.append(f"exit codes {codes}")
    if not wait_for(lambda: not fleet.orphans(), 10):
        found.append(f"processes left: {fleet.orphans()}")
    return {"fleet": found} if found else {}


def _figures(
    connection: redis.Redis,
    jobs: Sequence[ChaosJob],
    watchers: Watchers,
    fleet: Fleet,
    seconds: float,
) -> dict[str, object]:
    streams = [read_stream(stream_rows(connection, keys.stream_key(job.job_id))) for job in jobs]
    return {
        "seconds": round(seconds, 1),
        "tokens": sum(stream.num_tokens for stream in streams),
        "attempts": dict(sorted(Counter(stream.num_attempts for stream in streams).items())),
        "resumed": sum(stream.num_resumed for stream in streams),
        "reset": sum(stream.num_resets for stream in streams),
        "tokens recomputed": sum(stream.num_recomputed for stream in streams),
        "visits": sum(watched.num_visits for watched in watchers.seen.values()),
        "worker starts": [slot.num_starts for slot in fleet.slots],
        "cuts": sum(slot.proxy.num_cuts for slot in fleet.slots),
    }


@click.command()
@click.option("--seed", default=1, show_default=True)
@click.option("--minutes", default=1.0, show_default=True, help="How long things go wrong.")
@click.option("--jobs", "num_jobs", default=300, show_default=True)
@click.option("--max-tokens", default=200, show_default=True)
@click.option("--lease-seconds", default=3.0, show_default=True)
@click.option("--model", default="tiny", show_default=True, help="tiny, fake (no model at all), or any other.")
def main(seed: int, minutes: float, num_jobs: int, max_tokens: int, lease_seconds: float, model: str) -> None:
    """Run chaos for some minutes; on failure print the seed, the events and the histories of jobs."""
    from tests.acceptance.chaos.commands import worker_command

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # the processes started are ended too
    config = ChaosConfig(
        seed,
        num_jobs=num_jobs,
        max_tokens=(max_tokens // 10, max_tokens),
        fault_seconds=60 * minutes,
        lease_seconds=lease_seconds,
        has_chat=model != "fake",
    )
    with tempfile.TemporaryDirectory(prefix="promptmill-chaos-") as folder:
        report = run_chaos(worker_command(model, Path(folder), lease_seconds), config, Path(folder))
    print(f"seed {seed}: {'FAILED' if report.problems else 'passed'}\n{report}")
    sys.exit(bool(report.problems))


if __name__ == "__main__":
    main()
