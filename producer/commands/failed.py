"""`promptmill failed` and `promptmill retry`: the jobs that failed, and another try for them; `promptmill deferred`:
those that wait for others, perhaps in vain."""

import dataclasses
import json
from typing import Any

import click

from producer.commands.jobs import change_each, open_client
from producer.dead_letters import FailedJob
from producer.dependents import DeferredJob
from producer.settings import ProducerSettings, settings_options


@click.command()
@click.option("--json", "is_json", is_flag=True, help="Print one JSON object a line.")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="The last N that failed; default: all.")
@settings_options(ProducerSettings)
def failed(is_json: bool, limit: int | None, **flags: Any) -> None:
    """List the jobs that failed within 24 hours, and why, the latest first."""
    with open_client(flags) as client:
        jobs = client.failed(limit)
    for job in jobs:
        click.echo(json.dumps(dataclasses.asdict(job), ensure_ascii=False) if is_json else _line(job))
    if not jobs and not is_json:
        click.echo("no job has failed")


def _line(job: FailedJob) -> str:
    attempts = f"{job.attempts or '?'} attempt{'s' if job.attempts > 1 else ''}"
    when = f"{job.failed_at[:19]}Z" if job.failed_at else "?"
    return f"{job.job_id}  {job.queue}  {when}  {attempts}  {job.code}: {' '.join(job.message.split())}"


@click.command()
@click.argument("job_ids", nargs=-1, metavar="[JOB_ID]...")
@click.option("--all", "is_all", is_flag=True, help="Every job that `promptmill failed` lists.")
@settings_options(ProducerSettings)
def retry(job_ids: tuple[str, ...], is_all: bool, **flags: Any) -> None:
    """Put failed jobs back onto their queues; they start over. Exit code 1 if one had not failed, or does not exist."""
    if bool(job_ids) == is_all:
        raise click.UsageError("give JOB_IDs, or --all")
    with open_client(flags) as client:
        chosen = [job.job_id for job in client.failed()] if is_all else job_ids
        change_each(chosen, client.retry, done="queued again", missed="has not failed")


@click.command()
@click.option("--json", "is_json", is_flag=True, help="Print one JSON object a line.")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="The first N; default: all.")
@settings_options(ProducerSettings)
def deferred(is_json: bool, limit: int | None, **flags: Any) -> None:
    """List the jobs that wait for others, and how those ended.

    A job keeps waiting if its dependency failed, was cancelled or is no longer kept: retry the dependency, or cancel
    the jobs that wait for it with `promptmill cancel --dependents`.
    """
    with open_client(flags) as client:
        jobs = client.deferred(limit)
    for job in jobs:
        click.echo(json.dumps(dataclasses.asdict(job)) if is_json else _deferred_line(job))
    if not jobs and not is_json:
        click.echo("no job waits for another")


def _deferred_line(job: DeferredJob) -> str:
    waits_for = ", ".join(f"{name} ({status or 'no longer kept'})" for name, status in job.waits_for.items())
    return f"{job.job_id}  {job.queue}  waits for {waits_for or 'nothing any more'}"
