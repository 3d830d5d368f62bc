"""A short chaos run: what is promised holds whatever dies. `make chaos SEED=… MINUTES=…` runs longer ones."""

from pathlib import Path

import pytest

from engine import InferenceEngine, SamplingParams
from tests.acceptance.chaos.commands import REPEATS_ITSELF, worker_command
from tests.acceptance.chaos.run import ChaosConfig, run_chaos
from tests.acceptance.chaos.schedule import Fault, make_schedule
from tests.acceptance.chaos.workload import make_jobs
from tests.fakes.child_thread import ChildThread
from tests.fakes.tiny_models import make_tiny_model

CONFIG = ChaosConfig(seed=4, fault_seconds=20.0, max_tokens=(3, 40))


def test_a_schedule_follows_from_its_seed_and_has_every_fault() -> None:
    schedule = make_schedule(4, seconds=20.0, num_workers=3, lease_seconds=3.0)
    assert schedule == make_schedule(4, seconds=20.0, num_workers=3, lease_seconds=3.0)
    assert {event.fault for event in schedule} == set(Fault)


def test_every_kind_of_request_is_among_the_jobs() -> None:
    jobs = make_jobs(CONFIG.seed, CONFIG.num_jobs, CONFIG.max_tokens)
    for name in ("response_format", "regex", "choice", "grammar", "logprobs", "echo", "logit_bias", "stop", "tools"):
        asking = [job for job in jobs if job.fields.get(name)]
        assert len(asking) >= 5, name
    assert sum(job.fields["n"] > 1 and "tools" in job.fields for job in jobs) >= 3


def test_tokens_are_guessed_in_a_chaos_run(tmp_path: Path) -> None:
    folder = make_tiny_model("llama", tmp_path, **REPEATS_ITSELF)
    jobs = [
        job for job in make_jobs(CONFIG.seed, 300, CONFIG.max_tokens, has_chat=False) if not job.fields["temperature"]
    ]
    with InferenceEngine(
        str(folder), num_threads=1, num_kv_blocks=500, max_num_seqs=8, _start_child=ChildThread
    ) as engine:
        for job in jobs[:40]:
            engine.generate(job.fields["prompt"], SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True))
        stats = engine.get_stats()
    assert 0 < stats["num_accepted_draft_tokens"] < stats["num_draft_tokens"]


@pytest.mark.alone
@pytest.mark.timeout(600)
def test_300_jobs_on_three_workers_survive_everything(tmp_path: Path) -> None:
    report = run_chaos(worker_command("tiny", tmp_path, CONFIG.lease_seconds), CONFIG, tmp_path)
    print(report)
    assert not report.problems, f"seed {CONFIG.seed}\n{report}"
