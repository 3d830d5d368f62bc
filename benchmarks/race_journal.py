"""The measurements of a long race, kept in a file as they come, so that it can go on in another call."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.peer_process import Measurement


@dataclass(slots=True)
class RaceJournal:
    """By load, round and contender; and why a contender is out. `path` None: kept in memory alone."""

    path: Path | None = None
    runs: dict[tuple[str, int, str], Measurement] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.path is not None and self.path.exists():
            for line in self.path.read_text().splitlines():
                self._take(json.loads(line))

    def add_run(self, load: str, round_number: int, contender: str, measurement: Measurement) -> None:
        self._keep({"load": load, "round": round_number, "contender": contender, "measurement": measurement})

    def add_reason(self, contender: str, reason: str) -> None:
        self._keep({"contender": contender, "reason": reason})

    def of_load(self, load: str, rounds: int) -> dict[str, list[Measurement]]:
        """Each contender's measurements of all rounds; one that lacks some is left out."""
        names = dict.fromkeys(name for _, _, name in self.runs)
        keys = {name: [(load, number, name) for number in range(rounds)] for name in names}
        return {name: [self.runs[key] for key in of_name] for name, of_name in keys.items() if self._has(of_name)}

    def _has(self, keys: list[tuple[str, int, str]]) -> bool:
        return all(key in self.runs for key in keys)

    def _keep(self, entry: dict[str, object]) -> None:
        self._take(entry)
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(json.dumps(entry) + "\n")

    def _take(self, entry: dict[str, object]) -> None:
        contender = str(entry["contender"])
        if "reason" in entry:
            self.reasons[contender] = str(entry["reason"])
            return
        measurement = entry["measurement"]
        assert isinstance(measurement, dict), "a run has a measurement"
        self.runs[str(entry["load"]), int(str(entry["round"])), contender] = measurement
