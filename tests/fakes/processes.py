"""What Linux says of processes: which there are, whose they are, and whether they have ended."""

from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from tests.fakes.waiting import wait_until


class ProcessEntry(NamedTuple):
    pid: int
    state: str
    parent: int
    group: int
    session: int

    @classmethod
    def read(cls, pid: int | str) -> "ProcessEntry | None":
        """None: there is no such process."""
        with suppress(OSError):
            state, *ids = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[:4]
            return cls(int(pid), state, *map(int, ids))
        return None


def all_processes() -> list[ProcessEntry]:
    found = (ProcessEntry.read(folder.name) for folder in Path("/proc").glob("[0-9]*"))
    return [entry for entry in found if entry is not None]


def children_of(pid: int) -> list[int]:
    return [entry.pid for entry in all_processes() if entry.parent == pid]


def is_alive(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    entry = ProcessEntry.read(pid)
    return entry is not None and entry.state != "Z"


def wait_until_gone(pid: int) -> None:
    wait_until(lambda: not is_alive(pid), f"the end of {pid}")
