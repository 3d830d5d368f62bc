"""The flags that say how a prompt is put and answered, the same for every command that has prompts."""

from collections.abc import Callable
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])

_OPTIONS = (
    click.option("--raw", is_flag=True, help="Give the prompt to the model as it is, without its chat template."),
    click.option("--system", metavar="TEXT", help="A system message before the prompt."),
    click.option("--max-tokens", type=int, metavar="N", help="At most N tokens; default: until the model stops."),
    click.option("--temperature", type=float, metavar="T", help="0 (greedy) to 2; default: 1."),
    click.option("--top-p", type=float, metavar="P", help="Only the likeliest tokens that make up P."),
    click.option("--top-k", type=int, metavar="K", help="Only the K likeliest tokens."),
    click.option("--min-p", type=float, metavar="P", help="Only tokens at least P times as likely as the likeliest."),
    click.option("--min-tokens", type=int, metavar="N", help="At least N tokens."),
    click.option(
        "--presence-penalty", type=float, metavar="P", help="-2 to 2: penalise tokens that the answer has already."
    ),
    click.option(
        "--frequency-penalty",
        type=float,
        metavar="P",
        help="-2 to 2: penalise tokens by how often the answer has them.",
    ),
    click.option(
        "--repetition-penalty", type=float, metavar="P", help="Above 1: penalise tokens of prompt and answer."
    ),
    click.option("--seed", type=int, metavar="N", help="Makes a sampled answer repeatable."),
    click.option("--stop", multiple=True, metavar="TEXT", help="End before this text; may be given several times."),
    click.option("--ignore-eos", is_flag=True, default=None, help="Continue where the model would stop."),
)

tenant_option = click.option("--tenant", metavar="NAME", help="Tenant of the jobs: tenants take turns.")


def priority_class_option(default: str) -> Callable[[Command], Command]:
    """`default`: what is done where it is not given."""
    return click.option(
        "--priority-class",
        type=click.Choice(["high", "normal", "low"], case_sensitive=False),
        help=f"Before (high), among or behind (low) the queue's other jobs; default: {default}.",
    )


def embed_options(help_text: str) -> Callable[[Command], Command]:
    """`help_text`: what the command does with --embed."""
    dimensions = click.option("--dimensions", type=int, metavar="N", help="With --embed: only its first N numbers.")
    return lambda command: click.option("--embed", is_flag=True, help=help_text)(dimensions(command))


SAMPLING_FIELDS = (
    *("max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "ignore_eos"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty"),
)


def prompt_options(command: Command) -> Command:
    """Decorate a click command with them all."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def sampling_fields(flags: dict[str, Any]) -> dict[str, Any]:
    """Those of a request, or of an embedding, of the flags that were given. Raises click.UsageError."""
    if flags["raw"] and flags["system"] is not None:
        raise click.UsageError("--system is part of a chat; leave out --raw")
    if flags["embed"] and (flags["raw"] or flags["system"] is not None):
        raise click.UsageError("--embed has no chat; leave out --raw and --system")
    if flags["dimensions"] is not None and not flags["embed"]:
        raise click.UsageError("--dimensions are of an embedding; add --embed")
    given = {name: flags[name] for name in (*SAMPLING_FIELDS, "dimensions") if flags[name] not in (None, ())}
    return {name: list(value) if name == "stop" else value for name, value in given.items()}
