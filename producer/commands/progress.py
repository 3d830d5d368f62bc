"""How a run is shown on stderr while it goes on: a bar in a terminal, a line now and then in a log."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:  # who has no file to answer does not wait for what it takes
    from producer.batch.run import BatchProgress

REPORT_SECONDS = 10.0  # between two lines in a log

Show = Callable[["BatchProgress"], None]


@contextmanager
def shown_progress() -> Iterator[Show]:
    """What is yielded may be called at any pace."""
    with ExitStack() as stack:
        is_terminal = sys.stderr.isatty()
        view: AbstractContextManager[Show] = _bar() if is_terminal else nullcontext(_lines())
        draw = stack.enter_context(view)
        is_begun = False

        def show(progress: "BatchProgress") -> None:
            nonlocal is_begun
            if not is_begun:
                is_begun = True
                _hint(progress)
            draw(progress)

        yield show


def _hint(progress: "BatchProgress") -> None:
    """At what the run's beginning tells of its end."""
    if progress.idle_queue is not None:
        hint_at_missing_workers(progress.idle_queue, "jobs wait")
    if progress.num_null:
        rule = "rows have a null cell, and fail; the same command with --null TEXT asks them, now or later"
        click.echo(f"{progress.num_null} {rule}", err=True)


def hint_at_missing_workers(queue: str, who_waits: str) -> None:
    click.echo(f"no live worker drains the queue {queue!r}; the {who_waits} for one (promptmill worker)", err=True)


def _lines() -> Show:
    next_at = time.monotonic() + REPORT_SECONDS

    def show(progress: "BatchProgress") -> None:
        nonlocal next_at
        if (now := time.monotonic()) >= next_at:
            next_at = now + REPORT_SECONDS
            done = f"{progress.num_done} of {progress.num_lines} done, {progress.num_failed} failed"
            click.echo(f"{done}, {progress.speed}", err=True)

    return show


@contextmanager
def _bar() -> Iterator[Show]:
    """Done, failed, tokens/s and time left; drawn by rich at its own pace."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[failed]} failed"),
        TextColumn("{task.fields[speed]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with ExitStack() as stack:
        bar = Progress(*columns, console=Console(stderr=True))
        task = bar.add_task("run", total=None, failed=0, speed="")

        def show(progress: "BatchProgress") -> None:
            bar.update(
                task,
                total=progress.num_lines,
                completed=progress.num_done,
                failed=progress.num_failed,
                speed=progress.speed,
            )
            if not bar.live.is_started:  # what is refused before anything is asked is told in one line, without a bar
                stack.enter_context(bar)

        yield show
