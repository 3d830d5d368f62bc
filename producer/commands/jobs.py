"""`promptmill submit`, `result` and `cancel`. Errors are left to `producer.cli`."""

import json
import math
import signal
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import click

from producer.client import Client
from producer.commands.progress import hint_at_missing_workers
from producer.commands.prompt import (
    embed_options,
    priority_class_option,
    prompt_options,
    sampling_fields,
    tenant_option,
)
from producer.contract import Chunk, Result
from producer.contract.keys import split_tenant
from producer.errors import JobFailedError, JobNotFoundError, ResultTimeoutError
from producer.job import Job
from producer.settings import ProducerSettings, settings_options

# Of `timeout`, and of a terminal that was closed; Windows has no SIGHUP.
_STOP_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Seconds(click.FloatRange):
    """A time to wait: zero is a look, and nan would be for ever."""

    def __init__(self) -> None:
        super().__init__(min=0)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        seconds = float(super().convert(value, param, ctx))
        if not math.isfinite(seconds):
            self.fail(f"{value} is not a number of seconds; leave it out to wait without a limit", param, ctx)
        return seconds


def open_client(flags: dict[str, Any]) -> Client:
    """A client of the settings among `flags`; they are taken out of it."""
    return Client(**{name: flags.pop(name, None) for name in ProducerSettings.model_fields})


@click.command()
@click.argument("prompt")
@click.option("--stream", "is_streamed", is_flag=True, help="Print the text as it is generated.")
@click.option("--json", "is_json", is_flag=True, help="Print the result as JSON; with --stream, each chunk before it.")
@click.option("--detach", is_flag=True, help="Print the job's id and do not wait.")
@click.option("--model", metavar="NAME", help="Only a worker that serves this model takes the job.")
@embed_options("Print the embedding of PROMPT, as a JSON array of numbers, instead of an answer.")
@prompt_options
@click.option(
    "--logprobs", type=int, metavar="N", help="With --json: each token's log-probability and the N likeliest tokens."
)
@click.option("--n", type=int, metavar="N", help="Ask for N independent answers.")
@priority_class_option("normal")
@tenant_option
@click.option(
    "--timeout", type=Seconds(), metavar="SECONDS", help="How long to wait; then exit with 1, and the job continues."
)
@settings_options(ProducerSettings)
def submit(prompt: str, is_streamed: bool, is_json: bool, detach: bool, timeout: float | None, **flags: Any) -> None:
    """Submit PROMPT as a chat message, wait, and print the answer.

    A PROMPT of - is read from standard input. Ctrl-C, SIGTERM and SIGHUP cancel the job, and so does a reader of
    --stream that goes away.
    """
    if is_streamed and flags["embed"]:
        raise click.UsageError("--embed has no answer to stream; leave out --stream")
    if is_streamed and (flags["n"] or 1) > 1:
        raise click.UsageError("--stream shows one answer; leave out --n")
    if detach and (is_streamed or is_json or timeout is not None):
        raise click.UsageError("--detach does not wait for the answer; leave out --stream, --json and --timeout")
    if flags["logprobs"] is not None and not (is_json or detach):
        raise click.UsageError("--logprobs are shown with --json; add it, or leave them out")
    text = _read_standard_input() if prompt == "-" else prompt
    if not text:
        raise click.UsageError("PROMPT is empty")
    job_id = str(uuid.uuid4())  # known before the job is, so that Ctrl-C finds it at any moment
    with open_client(flags) as client, _cancelled_when_interrupted(client, job_id):
        named_class = None if flags["priority_class"] == "normal" else flags["priority_class"]
        job = client.submit(job_id=job_id, priority_class=named_class, **_request(text, flags))
        if detach:
            click.echo(job.id)
            return
        _hint_at_missing_workers(client, job)
        if is_streamed:
            _print_stream(job, timeout, is_json)
        _print_result(_wait(job, timeout, is_json), is_json, has_streamed=is_streamed)


def _read_standard_input() -> str:
    """As UTF-8, whatever the locale says."""
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise click.UsageError(f"standard input is not UTF-8: {error}") from error


def _request(prompt: str, flags: dict[str, Any]) -> dict[str, Any]:
    fields = {name: flags[name] for name in ("model", "n", "tenant") if flags[name] is not None}
    fields |= sampling_fields(flags)
    if flags["logprobs"] is not None:
        fields |= {"logprobs": True, "top_logprobs": flags["logprobs"]}
    if flags["embed"]:
        return {"task": "embed", "prompt": prompt, **fields}
    if flags["raw"]:
        return {"prompt": prompt, **fields}
    system = [] if flags["system"] is None else [{"role": "system", "content": flags["system"]}]
    return {"messages": [*system, {"role": "user", "content": prompt}], **fields}


def _hint_at_missing_workers(client: Client, job: Job) -> None:
    queue, _ = split_tenant(job.queue or "")
    if not any(queue in worker.queues for worker in client.workers()):
        hint_at_missing_workers(queue, "job waits")


@contextmanager
def _cancelled_when_interrupted(client: Client, job_id: str) -> Iterator[None]:
    for number in _STOP_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as by `nohup`
            signal.signal(number, signal.default_int_handler)
    try:
        yield
    except (KeyboardInterrupt, OSError) as error:  # or nobody can read on, as behind `| head`
        if isinstance(error, ResultTimeoutError):  # an OSError, as every TimeoutError is
            raise
        with suppress(JobNotFoundError):  # it had not been enqueued yet
            is_cancelled = client.cancel(job_id)
            fate = "was cancelled" if is_cancelled else f"had ended; to see its result: promptmill result {job_id}"
            click.echo(f"job {job_id} {fate}", err=True)
        raise


def _print_stream(job: Job, timeout: float | None, is_json: bool) -> None:
    try:
        for chunk in job.stream(timeout):
            if is_json:
                click.echo(_chunk_json(chunk))
            elif chunk.reset:
                click.echo("\nthe job starts over:", err=True)
            else:
                click.echo(chunk.text, nl=False)
    finally:
        if not is_json:
            click.echo()


def _chunk_json(chunk: Chunk) -> str:
    return json.dumps({**chunk.model_dump(mode="json", exclude_none=True), "reset": chunk.reset}, ensure_ascii=False)


def _wait(job: Job, timeout: float | None, is_json: bool) -> Result:
    """The result. That of a job that failed is printed as JSON where that is wanted, and raised all the same."""
    try:
        return job.result(timeout)
    except JobFailedError as error:
        if is_json and error.result is not None:
            click.echo(error.result.to_wire())
        raise


def _print_result(result: Result, is_json: bool, *, has_streamed: bool = False) -> None:
    """Print it, and leave with exit code 1 for one that is not whole."""
    if is_json:
        click.echo(result.to_wire())
    elif not has_streamed:
        for choice in result.choices:
            click.echo(choice.text if len(result.choices) == 1 else f"[{choice.index}] {choice.text}")
        for vector in result.vectors:
            click.echo(json.dumps(vector))
    if result.status != "finished":
        click.echo(f"Error: job {result.job_id} was {result.status}; what it had is shown", err=True)
        sys.exit(1)


@click.command()
@click.argument("job_id")
@click.option("--json", "is_json", is_flag=True, help="Print the whole result as JSON.")
@click.option(
    "--timeout",
    type=Seconds(),
    metavar="SECONDS",
    help="How long to wait for it; then exit with 1; default: no limit.",
)
@settings_options(ProducerSettings)
def result(job_id: str, is_json: bool, timeout: float | None, **flags: Any) -> None:
    """Print the result of a job, once there is one. Exit code 1 if it failed, was cancelled, or does not exist: results
    are kept for 24 hours."""
    with open_client(flags) as client:
        _print_result(_wait(client.job(job_id), timeout, is_json), is_json)


@click.command()
@click.argument("job_ids", nargs=-1, required=True, metavar="JOB_ID...")
@click.option("--dependents", is_flag=True, help="Also cancel the jobs that wait for these, even if these have ended.")
@settings_options(ProducerSettings)
def cancel(job_ids: tuple[str, ...], dependents: bool, **flags: Any) -> None:
    """Cancel jobs, queued or running. Exit code 1 if one had ended before, or does not exist."""
    with open_client(flags) as client:
        if dependents:  # first: the end of a job that others wait for could let them begin
            for dependent in [name for job_id in job_ids for name in client.cancel_dependents(job_id)]:
                click.echo(f"{dependent} cancelled")
        change_each(job_ids, client.cancel, done="cancelled", missed="had ended before")


def change_each(job_ids: Iterable[str], change: Callable[[str], bool], *, done: str, missed: str) -> None:
    """Say of each job what came of it; then leave with exit code 1 if one was missed, or is not known."""
    num_missed = 0
    for job_id in job_ids:
        try:
            is_done = change(job_id)
        except JobNotFoundError as error:
            click.echo(f"Error: {error}", err=True)
            num_missed += 1
            continue
        num_missed += not is_done
        click.echo(f"{job_id} {done if is_done else missed}")
    if num_missed:
        sys.exit(1)
