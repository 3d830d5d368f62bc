"""The race of CPU engines: what its table is made of, and what becomes of a contender that fails."""

import pytest

from benchmarks.cpu_peers import flops, race, table
from benchmarks.peer_process import Measurement
from benchmarks.workload import Workload

WORKLOAD = Workload([[1, 2, 3], [4]], [2, 3])


class FixedContender:
    def __init__(self, seconds: float, missing: int = 0) -> None:
        self._seconds = seconds
        self._missing = missing

    def run(self, workload: Workload) -> Measurement:
        counts = [limit - self._missing for limit in workload.max_tokens]
        return {"seconds": self._seconds, "counts": counts, "firsts": [0.5, 0.5], "lasts": [1.0, 1.5]}


def test_the_table_has_speeds_ratios_and_latencies_of_every_contender() -> None:
    runs = race({"promptmill": FixedContender(2.0), "slow": FixedContender(5.0)}, [WORKLOAD, WORKLOAD], {})
    rows = table("load", runs, [WORKLOAD, WORKLOAD], bound=flops(WORKLOAD))
    assert rows == [
        ["load", "promptmill", "2", "1.00", "50%", "0.50", "500.0"],
        ["load", "slow", "1", "2.50", "20%", "0.50", "500.0"],
    ]


def test_a_contender_with_another_number_of_tokens_is_out_and_the_reason_is_kept() -> None:
    reasons: dict[str, str] = {}
    runs = race({"promptmill": FixedContender(2.0), "short": FixedContender(1.0, missing=1)}, [WORKLOAD], reasons)
    assert list(runs) == ["promptmill"]
    assert "instead of" in reasons["short"]


def test_a_second_output_token_costs_what_the_first_did() -> None:
    one = flops(Workload([[1]], [1]))
    assert flops(Workload([[1]], [2])) == pytest.approx(2 * one)
