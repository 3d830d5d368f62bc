"""Commands from many threads to one that sleeps in a selector."""

import contextlib
import os
from collections.abc import Callable, Iterator
from queue import Empty, SimpleQueue

Command = Callable[[], None]


class Mailbox:
    """`put` from any thread wakes the selector that watches `fileno()`. After `close` nobody may put any more."""

    def __init__(self) -> None:
        self._commands: SimpleQueue[Command] = SimpleQueue()
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._reader, False)
        os.set_blocking(self._writer, False)

    def fileno(self) -> int:
        return self._reader

    def put(self, command: Command) -> None:
        self._commands.put(command)
        with contextlib.suppress(BlockingIOError):  # full: the reader has been woken often enough
            os.write(self._writer, b"\0")

    def take_all(self) -> Iterator[Command]:
        """Everything that was put so far. The pipe is emptied first, so that no command is left without a wake-up."""
        with contextlib.suppress(BlockingIOError):
            os.read(self._reader, 1 << 16)
        with contextlib.suppress(Empty):
            while True:
                yield self._commands.get_nowait()

    def close(self) -> None:
        os.close(self._reader)
        os.close(self._writer)
