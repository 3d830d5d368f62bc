"""The stages of a long benchmark: each a process of its own with a time limit, its findings kept in a journal.

So what one stage leaves in a device's memory is no other's, one that fails or hangs costs its own time alone, and a
call that is cut short is gone on with by the next. Knows nothing of what stages find.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.process_figures import children

Finding = dict[str, Any]
STAGE_SECONDS = 300
LEAST_SECONDS = 20  # no stage is begun with less


@dataclass(slots=True)
class StageJournal:
    """Findings by stage, and how each stage ended: `done`, or why it was not. `path` None: kept in memory alone.

    One file has those of several devices, each of which is known by its own alone.
    """

    path: Path | None
    device: str = ""
    outcomes: dict[str, str] = field(default_factory=dict)
    _findings: dict[str, list[Finding]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.path is not None and self.path.exists():
            for entry in map(json.loads, self.path.read_text().splitlines()):
                if entry["device"] == self.device:
                    self._take(entry)

    def begin(self, stage: str) -> None:
        """What an earlier try of the stage found is forgotten."""
        self._keep({"begin": stage})

    def add(self, stage: str, **finding: Any) -> None:
        self._keep({"stage": stage, "finding": finding})

    def end(self, stage: str, outcome: str) -> None:
        self._keep({"end": stage, "outcome": outcome})

    def findings(self, kind: str) -> list[Finding]:
        """Those of a kind, in the order in which they came."""
        return [finding for of_stage in self._findings.values() for finding in of_stage if finding["kind"] == kind]

    def is_settled(self, stage: str, again: bool) -> bool:
        """Whether the stage ended, and well if failed ones are run `again`."""
        return self.outcomes.get(stage) == "done" or (not again and stage in self.outcomes)

    def read_again(self) -> None:
        """Take in what a stage's own process wrote."""
        if self.path is not None:
            self.outcomes.clear()
            self._findings.clear()
            self.__post_init__()

    def _keep(self, entry: Finding) -> None:
        self._take(entry)
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(json.dumps(entry | {"device": self.device}) + "\n")

    def _take(self, entry: Finding) -> None:
        if "begin" in entry:
            self._findings[entry["begin"]] = []
        elif "end" in entry:
            self.outcomes[entry["end"]] = entry["outcome"]
        else:
            self._findings.setdefault(entry["stage"], []).append(entry["finding"])


def device_name() -> str:
    """The GPU's, without a CUDA context in this process; empty where there is none."""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    with suppress(OSError):
        names = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split("\n")
        return names[0].strip()
    return ""


def run_here(stage: str, run: Callable[[], None], journal: StageJournal) -> None:
    """Run a stage in this process, and note how it ended."""
    journal.begin(stage)
    try:
        run()
    except (Exception, SystemExit) as error:
        reason = str(error).strip().partition("\n")[0] or "no reason given"
        journal.end(stage, f"{type(error).__name__}: {reason}"[:300])
    else:
        journal.end(stage, "done")


def run_apart(
    stage: str, command: list[str], journal: StageJournal, until: float, limit: float = STAGE_SECONDS
) -> bool:
    """Run a stage as a process that writes to the journal itself; whether there was time for it.

    until: monotonic time, `limit`: seconds of a stage; a stage that is cut off by it is begun again by the next call.
    """
    seconds = min(limit, until - time.monotonic())
    if seconds < LEAST_SECONDS:
        return False
    start = time.monotonic()
    process = subprocess.Popen(command, start_new_session=True)
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        code = None
    finally:
        end_with_all(process)
    journal.read_again()
    if code is None and seconds < limit:
        return False
    if stage not in journal.outcomes:
        took = f"it took more than {limit:g} s" if code is None else f"its process ended with exit code {code}"
        journal.end(stage, took)
    print(f"{stage}: {journal.outcomes[stage]}, {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    return True


def end_with_all(process: "subprocess.Popen[bytes]") -> None:
    """Kill it and whatever it started, in sessions of their own too: a peer that is left keeps the device's memory."""
    started = _descendants(process.pid)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for pid in started:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def _descendants(pid: int) -> list[int]:
    return [each for child in children(pid) for each in (child, *_descendants(child))]
