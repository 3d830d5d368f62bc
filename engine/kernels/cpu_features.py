"""What the CPU can do, as Linux names it; on macOS only which one it is."""

import platform
from functools import cache
from pathlib import Path

_CPU_INFO = Path("/proc/cpuinfo")
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


@cache
def cpu_flags() -> frozenset[str]:
    """The first core's feature flags; elsewhere than on Linux none."""
    return frozenset(_first_value("flags", "Features").split())


@cache
def cpu_name() -> str:
    """The first core's model; on macOS the kernel's version, which ends with the chip that it was built for."""
    return platform.version() if platform.system() == "Darwin" else _first_value("model name", "CPU part")


@cache
def last_cache_bytes() -> int:
    """The largest of the caches of the first core; where the system does not say, what most CPUs have."""
    sizes = [path.read_text().strip() for path in _CACHES.glob("index*/size")]
    return max((int(size.removesuffix("K")) << 10 for size in sizes if size.endswith("K")), default=16 << 20)


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
