"""The GPU benchmark: its limits by hand, and one run of the whole in small under Triton's interpreter."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu_models import DeviceLimits, ModelSize, least_seconds
from benchmarks.workload import Workload

ROOT = Path(__file__).parents[2]
SIZE = ModelSize("unit", "qwen3", 1, 1, 1, 1, 1, 1, 1, True)


def test_the_limit_is_the_prefill_and_every_step_of_all_sequences() -> None:
    limits = DeviceLimits(bytes_a_second=10.0, flops_a_second=1000.0)
    assert (SIZE.num_layer_weights, SIZE.num_weights, SIZE.kv_bytes) == (7, 8, 4)
    prefill = (2 * 7 * 5 + 2 * (3**2 + 2**2)) / 1000
    steps = [16 / 10 + (4 + 3) * 4 / 10, 16 / 10 + 4 * 4 / 10]  # the first sequence ends after its second token
    assert least_seconds(SIZE, Workload([[1] * 3, [1] * 2], [2, 3]), limits) == pytest.approx(prefill + sum(steps))


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="there is no Triton")
@pytest.mark.timeout(600)
def test_the_whole_benchmark_runs_in_small_on_a_cpu() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--smoke", "--peers", "nobody"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "differ" not in result.stdout and "| sampler " in result.stdout
    assert "promptmill, queued" in result.stdout and "nobody has no figures: not installed" in result.stdout
    assert "decode attention" in result.stdout and "smoke run: no result is kept" in result.stdout
