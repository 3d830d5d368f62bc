"""The command line `promptmill`: arguments in, client calls, lines out. Owns the exit codes.

0  done
1  a job failed, was cancelled, does not exist, or did not end in time
2  a flag, a setting, a file or a request is wrong; nothing was enqueued
3  Redis cannot be reached, or refuses us; of servers also: it could not start, or lost what it needs
130  interrupted

Every failure is one line on stderr. Commands are loaded when they are used; those of other packages are found by entry
point. So a worker's start pays for no client, and Ctrl-C is heard while they are loaded.
"""

import errno
import io
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

    from producer.errors import PromptmillError

OWN_COMMANDS = {
    "submit": "producer.commands.jobs",
    "run": "producer.commands.run",
    "result": "producer.commands.jobs",
    "cancel": "producer.commands.jobs",
    "status": "producer.commands.status",
    "failed": "producer.commands.failed",
    "retry": "producer.commands.failed",
    "deferred": "producer.commands.failed",
}
COMMANDS_GROUP = "promptmill.commands"
OWN_PACKAGES = ("engine", "producer", "worker")
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_UNREACHABLE = 3
EXIT_INTERRUPTED = 130

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


class CommandGroup(click.Group):
    """Our own commands, and those that other packages of the distribution register."""

    def list_commands(self, context: click.Context) -> list[str]:
        return sorted({*OWN_COMMANDS, *_registered()})

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in OWN_COMMANDS:
            return _load(name)
        command = getattr(import_module(OWN_COMMANDS[name]), name)
        assert isinstance(command, click.Command)
        return command

    def main(self, *args: Any, **extra: Any) -> Any:
        if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
            sys.stdout.reconfigure(errors="backslashreplace")  # an answer may hold what a terminal's encoding lacks
        try:
            return super().main(*args, **extra)
        except OSError as error:
            if error.filename is not None or error.errno not in _NO_ROOM:
                raise  # not of standard output: files' errors are told by whoever writes them
            # What is held back for it would fail once more at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            click.echo(f"Error: standard output cannot be written: {error.strerror or error}", err=True)
            sys.exit(EXIT_FAILED)

    def invoke(self, context: click.Context) -> Any:
        try:
            return self._invoke(context)
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            sys.exit(EXIT_INTERRUPTED)

    def _invoke(self, context: click.Context) -> Any:
        from producer.errors import PromptmillError

        try:
            return super().invoke(context)
        except PromptmillError as error:
            click.echo(f"Error: {error}", err=True)
            sys.exit(exit_code(error))
        except ModuleNotFoundError as error:  # of a command that imports what it needs when it runs
            entry_point = _registered().get(context.invoked_subcommand or "")
            if entry_point is None or (error.name or "").partition(".")[0] in OWN_PACKAGES:
                raise
            click.echo(f"Error: {_needs(entry_point, error)}", err=True)
            sys.exit(EXIT_USAGE)


def exit_code(error: "PromptmillError") -> int:
    from producer.errors import BatchFileError, InvalidJobError, PortTakenError, RedisUnavailableError, SettingsError

    if isinstance(error, (RedisUnavailableError, PortTakenError)):
        return EXIT_UNREACHABLE
    return EXIT_USAGE if isinstance(error, (InvalidJobError, SettingsError, BatchFileError)) else EXIT_FAILED


def _registered() -> "dict[str, EntryPoint]":
    from importlib.metadata import entry_points

    return {entry_point.name: entry_point for entry_point in entry_points(group=COMMANDS_GROUP)}


def _load(name: str) -> click.Command | None:
    entry_point = _registered().get(name)
    if entry_point is None:
        return None
    try:
        command = entry_point.load()
    except ImportError as error:
        return _missing(name, entry_point, error)
    assert isinstance(command, click.Command)
    return command


def _missing(name: str, entry_point: "EntryPoint", error: ImportError) -> click.Command:
    """A command whose packages are not installed: it is listed, and says what it needs."""

    def refuse(arguments: Sequence[str]) -> None:
        from producer.errors import SettingsError

        raise SettingsError(_needs(entry_point, error))

    return click.Command(
        name,
        callback=refuse,
        params=[click.Argument(["arguments"], nargs=-1, type=click.UNPROCESSED)],
        context_settings={"ignore_unknown_options": True},
        add_help_option=False,  # its help lies with its packages: whoever asks for it is told what is missing
        short_help=f"(needs: {_remedy(entry_point)})",
    )


def _needs(entry_point: "EntryPoint", error: ImportError) -> str:
    return f"`promptmill {entry_point.name}` needs: {_remedy(entry_point)} ({error})"


def _remedy(entry_point: "EntryPoint") -> str:
    folders = entry_point.module.split(".")[:-1]
    extra = "gateway" if "gateway" in folders else folders[0]  # each is named as the package that needs it
    return f"pip install 'promptmill[{extra}]'"


@click.group(cls=CommandGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(package_name="promptmill", prog_name="promptmill")
def main() -> None:
    """Submit prompt jobs to queues in Redis, follow them, read their results; start the workers that answer them.

    To begin: `promptmill serve`, then in another terminal `promptmill submit "Name a river."`

    A flag whose help names a PROMPTMILL_* variable can also be set by that variable; the flag wins.

    \b
    Exit codes:
      0    done
      1    a job failed, was cancelled, does not exist, or did not end in time
      2    a flag, a setting, a file or a request is wrong
      3    Redis cannot be reached, or refuses the login, for example; for worker,
           serve, demo and gateway also: it could not start, or lost what it needs
      130  interrupted
    """
