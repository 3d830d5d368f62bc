"""The race of CPU engines: what its table is made of, what is kept, and what becomes of a contender that fails."""

import sys
from pathlib import Path

import pytest

from benchmarks import cpu_peers, peer_environment
from benchmarks.cpu_bound import LAYER_WEIGHTS, OUTPUT_WEIGHTS, Bound, flops
from benchmarks.cpu_peers import race, table
from benchmarks.peer_environment import PeerError, PeerProcess
from benchmarks.peer_process import Measurement
from benchmarks.race_journal import RaceJournal
from benchmarks.workload import Workload
from tests.fakes.tiny_models import make_tiny_model

LOAD = "8 prompts U(32,256) → U(32,128)"
WORKLOAD = Workload([[1, 2, 3], [4]], [2, 3])


class FixedContender:
    def __init__(self, seconds: float, missing: int = 0) -> None:
        self._seconds = seconds
        self._missing = missing

    def run(self, workload: Workload) -> Measurement:
        counts = [limit - self._missing for limit in workload.max_tokens]
        return {"seconds": self._seconds, "counts": counts, "firsts": [0.5, 0.5], "lasts": [1.0, 1.5]}


@pytest.fixture(autouse=True)
def _short_workload(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_peers, "workload_of", lambda title, number: WORKLOAD)


def run_race(contenders: dict[str, FixedContender], journal: RaceJournal, *, rounds: int, until: float = 1e99) -> None:
    for number in range(rounds):
        race(contenders.__getitem__, list(contenders), LOAD, number, journal, until)


def test_the_table_has_speeds_ratios_and_latencies_of_every_contender() -> None:
    journal = RaceJournal()
    contenders = {
        "promptmill float32": FixedContender(2.0),
        "promptmill int8": FixedContender(1.0),
        "slow": FixedContender(5.0),
    }
    run_race(contenders, journal, rounds=2)
    rows = table("load", journal.of_load(LOAD, 2), [WORKLOAD, WORKLOAD], Bound(flops(WORKLOAD), 1e30, 4))
    assert rows == [
        ["load", "promptmill float32", "2", "1.00", "-", "2.00", "50%", "0.50", "500.0"],
        ["load", "promptmill int8", "5", "0.50", "-", "1.00", "100%", "0.50", "500.0"],
        ["load", "slow", "1", "2.50", "-", "5.00", "20%", "0.50", "500.0"],
    ]


def test_a_contender_with_another_number_of_tokens_is_out_and_the_reason_is_kept(tmp_path: Path) -> None:
    journal = RaceJournal(tmp_path / "race.jsonl")
    run_race({"promptmill": FixedContender(2.0), "short": FixedContender(1.0, missing=1)}, journal, rounds=1)
    assert list(journal.of_load(LOAD, 1)) == ["promptmill"]
    assert "instead of" in RaceJournal(tmp_path / "race.jsonl").reasons["short"]


def test_a_race_goes_on_where_it_stopped(tmp_path: Path) -> None:
    path = tmp_path / "race.jsonl"
    run_race({"promptmill": FixedContender(2.0)}, RaceJournal(path), rounds=2)
    run_race({"slow": FixedContender(5.0)}, RaceJournal(path), rounds=2, until=0.0)  # no time is left
    assert list(RaceJournal(path).of_load(LOAD, 2)) == ["promptmill"]
    run_race({"slow": FixedContender(5.0)}, RaceJournal(path), rounds=2)
    journal = RaceJournal(path)
    assert list(journal.of_load(LOAD, 2)) == ["promptmill", "slow"]
    assert journal.of_load(LOAD, 3) == {}


def test_a_peer_that_takes_too_long_is_killed_and_named() -> None:
    peer = PeerProcess(peer_environment.spawn([sys.executable, "-c", "input()"]))
    with pytest.raises(PeerError, match=r"took more than 0\.05 s"):
        peer.read(0.05)
    peer.close()


def test_transformers_tells_when_each_prompt_had_its_first_and_last_token(tmp_path: Path) -> None:
    peer = peer_environment.start(
        peer_environment.PEERS["transformers"], str(make_tiny_model("llama", tmp_path)), "float32"
    )
    run = peer.run(Workload([[1, 2, 3], [4] * 40], [5, 1]))
    peer.close()
    assert run["counts"] == [5, 1]
    assert 0 < run["firsts"][0] < run["lasts"][0] <= run["seconds"]
    assert 0 < run["firsts"][1] == run["lasts"][1] <= run["seconds"]


def test_a_second_output_token_costs_what_the_first_did() -> None:
    one = flops(Workload([[1]], [1]))
    assert flops(Workload([[1]], [2])) == pytest.approx(2 * one)


def test_memory_bounds_a_single_sequence_and_products_bound_many() -> None:
    bound = Bound(flops_per_second=1e11, bytes_per_second=1e10, bytes_per_weight=4)
    weights = LAYER_WEIGHTS + OUTPUT_WEIGHTS
    assert bound.seconds(Workload([[1]], [10])) == pytest.approx(10 * weights * 4 / 1e10)
    many = Workload([[1] * 100] * 64, [10] * 64)
    assert bound.seconds(many) == pytest.approx(flops(many) / 1e11)
