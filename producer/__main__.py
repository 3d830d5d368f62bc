"""The console script `promptmill`, also `python -m producer`: takes care of what a process may meet at its start.

Signals are heard while the command line is imported. There is nothing to end yet: Python would answer Ctrl-C with a
traceback; and the first process of a container gets no signal that it has not asked for, so that whoever stops it would
wait, and kill it.
"""

import os
import signal
from types import FrameType


def main() -> None:
    _open_standard_files()
    inherited = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    heard = [number for number, handler in inherited.items() if handler is not signal.SIG_IGN]
    for number in heard:
        signal.signal(number, _leave)
    from producer.cli import main as run_command

    for number in heard:
        if number == signal.SIGINT or os.getpid() != 1:  # commands that end otherwise at SIGTERM say so themselves
            signal.signal(number, inherited[number])
    run_command()


def _open_standard_files() -> None:
    """What was started with some of them closed would take its first sockets for them."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(fd, True)
    os.close(fd)


def _leave(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)  # whoever waits for us sees by what we end
    os._exit(128 + number)  # the first process of a container goes on


if __name__ == "__main__":
    main()
