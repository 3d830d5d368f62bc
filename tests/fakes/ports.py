"""Ports for servers that are started later, or come back to theirs: such as nobody is given who asks for any."""

import itertools
import random
import socket

FIRST, LAST = 20_000, 32_000  # Linux gives those from 32,768 on, other systems from 49,152 on
_numbers = itertools.count(random.SystemRandom().randrange(LAST - FIRST))  # test runs lie side by side


def free_port() -> int:
    """Another one each time."""
    for number in _numbers:
        port = FIRST + number % (LAST - FIRST)
        with socket.socket() as listener:
            try:
                listener.bind(("127.0.0.1", port))
            except OSError:  # a stranger's
                continue
            return port
    raise AssertionError("the numbers have no end")
