"""What the CPU can do, as Linux names it; on macOS only which one it is."""

import platform
from functools import cache
from pathlib import Path

_CPU_INFO = Path("/proc/cpuinfo")


@cache
def cpu_flags() -> frozenset[str]:
    """The first core's feature flags; elsewhere than on Linux none."""
    return frozenset(_first_value("flags", "Features").split())


@cache
def cpu_name() -> str:
    """The first core's model; on macOS the kernel's version, which ends with the chip that it was built for."""
    return platform.version() if platform.system() == "Darwin" else _first_value("model name", "CPU part")


def _first_value(*names: str) -> str:
    try:
        lines = _CPU_INFO.read_text().splitlines()
    except OSError:
        return ""
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() in names:
            return value.strip()
    return ""
