"""What Linux says of a process: its children, its memory, and the CPU time that it took."""

import os
import time
from pathlib import Path


def children(pid: int) -> list[int]:
    """The processes that a process started and that are still there."""
    return [int(child) for path in Path(f"/proc/{pid}/task").glob("*/children") for child in path.read_text().split()]


def cpu_seconds(pid: int) -> float:
    """User and system time of all its threads so far, to the nanosecond (`/proc` counts hundredths of a second)."""
    return time.clock_gettime((~pid << 3) | 2)  # as clock_getcpuclockid(3) has it


def busy_seconds() -> float:
    """What all cores together have worked so far, for whomever; time that a hypervisor gave to others counts."""
    names = ("user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal")
    values = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    ticks = dict(zip(names, map(int, values), strict=False))
    return sum(ticks[name] for name in names if name not in ("idle", "iowait")) / os.sysconf("SC_CLK_TCK")


def memory_bytes(pid: int, name: str) -> int:
    """`VmRSS`, what is resident now, or `VmHWM`, the most that ever was. Raises `OSError` if the process is gone."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), 0)
