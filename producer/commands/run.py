"""`promptmill run`: a file of batch lines, or a table."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from producer.batch.protocol import MAX_IN_FLIGHT, BatchOptions
from producer.batch.run import BatchProgress, BatchRun
from producer.commands.progress import shown_progress
from producer.commands.prompt import (
    embed_options,
    priority_class_option,
    prompt_options,
    sampling_fields,
    tenant_option,
)
from producer.settings import ProducerSettings, load_settings, settings_options
from producer.tables.run import TableOptions, TableRun
from producer.tables.select import is_table


@click.command()
@click.argument("source", metavar="IN", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("target", metavar="OUT", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--prompt", metavar="TEXT", help="A table's prompt, with columns in braces: 'Summarise: {text}'.")
@prompt_options
@embed_options("Answer each row of a table with the embedding of its prompt, in the column embedding.")
@click.option("--null", "null_text", metavar="TEXT", help="Text for a null cell; default: its row fails.")
@click.option("--prefix", default="", metavar="TEXT", help="Prefix of the names of a table's new columns.")
@click.option(
    "--max-in-flight",
    type=click.IntRange(min=1),
    default=MAX_IN_FLIGHT,
    show_default=True,
    metavar="N",
    help="At most N jobs on the queues at a time.",
)
@click.option("--model", metavar="NAME", help="The model for every line, whatever the lines say.")
@priority_class_option("low, if a worker drains that")
@tenant_option
@click.option(
    "--run-id", default="", metavar="NAME", help="Name of another run of the same IN, which asks all of it again."
)
@click.option("--retry-failed", is_flag=True, help="Ask again what OUT has an error for, and replace the errors.")
@click.option(
    "--cancel", "is_cancelled", is_flag=True, help="Cancel the jobs that an interrupted run left; ask nothing."
)
@settings_options(ProducerSettings)
def run(source: Path, target: Path, retry_failed: bool, is_cancelled: bool, **flags: Any) -> None:
    """Answer every line or row of IN exactly once, in OUT.

    Without --prompt, IN and OUT are .jsonl files in the format of OpenAI's Batch API; answers come in the order in
    which they end. With --prompt, IN is a .csv, .tsv or .parquet table, and OUT (a table or a .jsonl file) has its rows
    in their order, with the new columns response, finish_reason, error, prompt_tokens and completion_tokens, or with
    --embed embedding, error and prompt_tokens. {{ and }} in --prompt are literal braces.

    The same command continues an interrupted run. It skips what OUT has an answer or an error for; with --retry-failed
    only the answers. Ctrl-C leaves the jobs in flight on the queues: the same command collects their results within 24
    hours; with --cancel it cancels them. A table's answers are in OUT.journal until all are there; if some are errors
    it stays, for --retry-failed. Exit code 1 if any failed.
    """
    if str(target) == "-":
        raise click.UsageError("OUT must be a file, so that a run can continue; - is not one")
    if is_cancelled and retry_failed:
        raise click.UsageError("--cancel asks nothing; leave out --retry-failed")
    named_class = flags.pop("priority_class")
    options = BatchOptions(
        flags.pop("max_in_flight"),
        flags.pop("run_id"),
        flags.pop("model"),
        flags.pop("tenant"),
        priority_class="" if named_class == "normal" else named_class,
    )
    settings = load_settings(ProducerSettings, {name: flags[name] for name in ProducerSettings.model_fields})
    with shown_progress() as show:
        opened = _open_run(settings, source, target, options, flags, show, retry_failed)
        if is_cancelled:
            click.echo(f"{opened.cancel()} jobs cancelled", err=True)
            return
        try:
            progress = opened.run()
        except KeyboardInterrupt:
            click.echo(
                "the jobs in flight go on: run the same command again to collect them, or with --cancel", err=True
            )
            raise
    num_good = progress.num_done - progress.num_failed
    click.echo(
        f"{num_good} answered, {progress.num_failed} failed, {progress.speed} → {target}",
        err=True,
    )
    if progress.first_problem is not None:
        click.echo(f"the first that failed, {progress.first_problem}", err=True)
    if progress.num_retryable and not retry_failed:
        click.echo("the same command with --retry-failed asks again what failed", err=True)
    if progress.num_failed:
        sys.exit(1)


def _open_run(
    settings: ProducerSettings,
    source: Path,
    target: Path,
    options: BatchOptions,
    flags: dict[str, Any],
    show: Callable[[BatchProgress], None],
    retry_failed: bool,
) -> BatchRun | TableRun:
    """Raises click.UsageError for flags that do not go with the files."""
    fields = sampling_fields(flags)
    if flags["prompt"] is not None:
        table = TableOptions(
            prompt=flags["prompt"],
            system=flags["system"],
            is_raw=flags["raw"],
            embeds=flags["embed"],
            null_text=flags["null_text"],
            prefix=flags["prefix"],
            fields=fields,
        )
        return TableRun(settings, source, target, table, options, show, retries_failed=retry_failed)
    if is_table(source):
        raise click.UsageError(f"{source} is a table: say what to ask, with --prompt 'Summarise: {{text}}'")
    if is_table(target):
        raise click.UsageError(f"{target}: the answers to batch lines are a .jsonl file")
    given = [*fields, *(name for name in ("raw", "embed", "system", "null_text", "prefix") if flags[name])]
    if given:
        flag = "--" + given[0].removesuffix("_text").replace("_", "-")
        raise click.UsageError(f"{flag} goes with --prompt and a table; batch lines say it themselves")
    return BatchRun.of_files(settings, source, target, options, show, retries_failed=retry_failed)
