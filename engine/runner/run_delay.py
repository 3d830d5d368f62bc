"""How long this process's threads were kept off their cores by others. Knows nothing of steps."""

import os
import resource
from contextlib import suppress

_SLICE_SECONDS = 0.003  # how long Linux lets the other one run, about


def run_delay_seconds() -> float:
    """Of all threads together, so far: while they could have run and waited for a core."""
    try:
        threads = os.listdir("/proc/self/task")
    except OSError:
        threads = []
    nanoseconds = [held for thread in threads if (held := _run_delay(thread)) is not None]
    if not nanoseconds:  # a system that does not tell: how often it happened, at the usual length
        return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw * _SLICE_SECONDS
    return sum(nanoseconds) / 1e9


def _run_delay(thread: str) -> int | None:
    """Nanoseconds; None where the thread is gone, or the kernel keeps no such figures."""
    with suppress(OSError, ValueError, IndexError), open(f"/proc/self/task/{thread}/schedstat", "rb") as file:
        return int(file.read().split()[1])
    return None
