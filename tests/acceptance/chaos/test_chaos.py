"""A short chaos run: what is promised holds whatever dies. `make chaos SEED=… MINUTES=…` runs longer ones."""

from pathlib import Path

import pytest

from tests.acceptance.chaos.commands import worker_command
from tests.acceptance.chaos.run import ChaosConfig, run_chaos
from tests.acceptance.chaos.schedule import Fault, make_schedule

CONFIG = ChaosConfig(seed=4, fault_seconds=20.0, max_tokens=(3, 40))


def test_a_schedule_follows_from_its_seed_and_has_every_fault() -> None:
    schedule = make_schedule(4, seconds=20.0, num_workers=3, lease_seconds=3.0)
    assert schedule == make_schedule(4, seconds=20.0, num_workers=3, lease_seconds=3.0)
    assert {event.fault for event in schedule} == set(Fault)


@pytest.mark.timeout(600)
def test_300_jobs_on_three_workers_survive_everything(tmp_path: Path) -> None:
    report = run_chaos(worker_command("tiny", tmp_path, CONFIG.lease_seconds), CONFIG, tmp_path)
    print(report)
    assert not report.problems, f"seed {CONFIG.seed}\n{report}"
