"""Every kernel compiles to machine code for GPUs that are not there, and fits their shared memory and registers.

In a process of its own: where Triton's interpreter is on, there is nothing to compile.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
KERNELS = {
    "add_norm_kernel",
    "choose_kernel",
    "decode_kernel",
    "draw_kernel",
    "gather_kernel",
    "glu_kernel",
    "linear_kernel",
    "mask_kernel",
    "max_kernel",
    "merge_kernel",
    "norm_kernel",
    "penalize_kernel",
    "prefill_kernel",
    "profile_kernel",
    "qkv_kernel",
    "settle_kernel",
    "threshold_kernel",
    "write_kernel",
}


MOST_ATTENTION_KERNELS = 16  # of one model


@pytest.mark.timeout(600)
@pytest.mark.parametrize("capability", [90, 89])
def test_every_kernel_compiles_and_fits_the_gpus_shared_memory_and_registers(capability: int) -> None:
    result = run_compiler("tests.fakes.triton_compiler", str(capability))
    assert result.returncode == 0, result.stderr[-3000:]
    assert {line.split()[0] for line in result.stdout.splitlines()} == KERNELS


def test_steps_of_all_shapes_share_few_kernels_and_run_those_that_they_say() -> None:
    result = run_compiler("tests.fakes.launched_kernels")
    assert result.returncode == 0, result.stderr[-3000:]
    numbers = [int(number) for number in result.stdout.split()]
    assert len(numbers) == 8 and max(numbers) <= MOST_ATTENTION_KERNELS


def run_compiler(*command: str) -> "subprocess.CompletedProcess[str]":
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", *command],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
