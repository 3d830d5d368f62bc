"""`promptmill run`: a file of batch lines, with a progress bar on stderr."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from producer.batch import BatchProgress, BatchRun
from producer.batch_protocol import MAX_IN_FLIGHT, BatchOptions
from producer.settings import ProducerSettings, load_settings, settings_options


@click.command()
@click.argument("source", metavar="IN.jsonl", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("target", metavar="OUT.jsonl", type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--max-in-flight",
    type=click.IntRange(min=1),
    default=MAX_IN_FLIGHT,
    show_default=True,
    help="So many jobs on the queues at a time.",
)
@click.option("--model", metavar="NAME", help="The model for every line, whatever the lines say.")
@click.option("--priority-class", type=click.Choice(["high", "low"]), help="Before, or after, the queue's other jobs.")
@click.option(
    "--run-id", default="", metavar="TEXT", help="Another run of the same file: give it a name to have it run anew."
)
@settings_options(ProducerSettings)
def run(source: Path, target: Path, max_in_flight: int, run_id: str, **flags: Any) -> None:
    """Answer every line of IN.jsonl (OpenAI Batch requests) with a line of OUT.jsonl, in the order they end.

    Lines that OUT.jsonl answers already are passed over. Ctrl-C leaves OUT.jsonl whole and the jobs in flight where
    they are: the same command collects their results within 24 hours, and goes on. Exit code 1 if any line failed.
    """
    options = BatchOptions(max_in_flight, run_id, flags.pop("model"), flags.pop("priority_class"))
    settings = load_settings(ProducerSettings, flags)
    with _progress_bar() as show:
        batch = BatchRun(settings, source, target, options, on_progress=show)
        try:
            progress = batch.run()
        except KeyboardInterrupt:
            click.echo("the jobs in flight go on: run the same command again to collect them", err=True)
            raise
    num_good = progress.num_done - progress.num_failed
    click.echo(
        f"{num_good} answered, {progress.num_failed} failed, {progress.tokens_per_second:.0f} tokens/s → {target}",
        err=True,
    )
    if progress.num_failed:
        sys.exit(1)


@contextmanager
def _progress_bar() -> Iterator[Callable[[BatchProgress], None]]:
    """Done, failed, tokens/s and time left; drawn by rich at its own pace, whatever the pace of the answers."""
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
        TextColumn("{task.fields[rate]:.0f} tokens/s"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("run", total=None, failed=0, rate=0.0)

        def show(progress: BatchProgress) -> None:
            bar.update(
                task,
                total=progress.num_lines,
                completed=progress.num_done,
                failed=progress.num_failed,
                rate=progress.tokens_per_second,
            )

        yield show
