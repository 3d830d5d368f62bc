"""One mixture of jobs under a few seconds of faults. `make chaos` runs many more, each with a seed of its own."""

from pathlib import Path

from tests.acceptance.chaos.mixture_run import run_mixture

SEED = 2


def test_jobs_of_all_kinds_end_once_and_leave_nothing_whatever_is_lost_cut_or_killed(tmp_path: Path) -> None:
    report = run_mixture(SEED, num_jobs=30, fault_seconds=3.0, folder=tmp_path)
    assert not report.problems, f"seed {SEED}: {report}"
    assert report.num_jobs > 30 and report.events
