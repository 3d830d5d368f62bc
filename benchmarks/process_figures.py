"""What Linux says of a process: its children, and the CPU time that it took."""

import time
from pathlib import Path


def children(pid: int) -> list[int]:
    """The processes that a process started and that are still there."""
    return [int(child) for path in Path(f"/proc/{pid}/task").glob("*/children") for child in path.read_text().split()]


def cpu_seconds(pid: int) -> float:
    """User and system time of all its threads so far, to the nanosecond (`/proc` counts hundredths of a second)."""
    return time.clock_gettime((~pid << 3) | 2)  # as clock_getcpuclockid(3) has it
