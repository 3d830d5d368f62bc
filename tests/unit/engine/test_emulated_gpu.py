"""The machine code of Triton's kernels, run on a GPU that is emulated: what their interpreter cannot tell.

And the emulator itself: what a device would trap on, or do right by chance, is an error there.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.emulation.ptx.instructions import function_of
from tests.emulation.ptx.machine import Machine
from tests.emulation.ptx.memory import GlobalMemory, KernelFault, SharedMemory
from tests.emulation.ptx.program import read_program

ROOT = Path(__file__).parents[3]
# Some of each kernel's: all of them take minutes.
KERNELS_TESTS = {
    "attention": [
        "a_row_has_the_same_bits_alone_packed_chunked_and_decoded_where_it_is_promised[all-dtype0]",
        "a_mixed_step_equals_the_torch_twin[dtype1]",
        "pages_may_lie_further_than_32_bits_count",
    ],
    "linear": ["a_layer_is_the_product_and_a_row_the_same_alone[True-(20, 16, 32)-torch.bfloat16]"],
    "rows": [
        "a_norm_is_its_formula_and_a_row_does_not_depend_on_its_batch[rule1-577-torch.bfloat16]",
        "an_addition_and_a_norm_are_those_of_torch[577-torch.bfloat16]",
        "a_gated_activation_is_that_of_torch[1030-True-torch.bfloat16]",
        "heads_are_normed_rotated_and_written_and_nothing_else_is[True-shape3-torch.bfloat16]",
    ],
    "sampling": [
        "the_tokens_are_those_that_torch_draws[1100-3.0-16-99]",
        "a_row_with_nan_writes_into_no_other_rows_room",
        "minus_infinity_is_never_drawn_and_a_row_of_nan_gives_some_token",
        "penalties_change_the_logits_to_torchs_bits_and_back",
        "a_row_is_settled_as_in_torch",
        "a_mask_hides_the_tokens_whose_bit_is_not_set[1000]",
    ],
}
HEAD = """
.visible .entry some_kernel(
	.param .u64 .ptr .global .align 1 some_kernel_param_0
)
.reqntid 64
{
	.reg .pred 	%p<4>;
	.reg .b32 	%r<9>;
	.reg .b64 	%rd<9>;
	mov.u32 	%r1, %tid.x;
	ld.param.b64 	%rd1, [some_kernel_param_0];
	mad.wide.s32 	%rd2, %r1, 4, %rd1;  // of each thread's word
	shl.b32 	%r2, %r1, 2;
	xor.b32 	%r3, %r2, 128;  // of the other warp's
"""


def run(body: str, values: "np.ndarray[tuple[int], np.dtype[np.int32]]") -> None:
    """64 threads over these words."""
    program = read_program(HEAD + body + "\n\tret;\n}\n")
    memory = GlobalMemory([(values.ctypes.data, values.nbytes)])
    parameters: dict[str, np.generic] = {"some_kernel_param_0": np.uint64(values.ctypes.data)}
    machine = Machine(program, 64, SharedMemory(256), memory, parameters, (0, 0, 0), (1, 1, 1))
    machine.run([function_of(instruction) for instruction in program.instructions])


def words() -> "np.ndarray[tuple[int], np.dtype[np.int32]]":
    return np.arange(64, dtype=np.int32)


SWAP = """
	ld.global.b32 { %r4 }, [ %rd2 + 0 ];
	st.shared.b32 [ %r2 + 0 ], %r4;
	BARRIER
	ld.shared.b32 %r5, [%r3];
	st.global.b32 [ %rd2 + 0 ], { %r5 };
"""
COPY = """
	cp.async.ca.shared.global [ %r2 + 0 ], [ %rd2 + 0 ], 0x4;
	cp.async.commit_group;
	WAIT
	ld.shared.b32 %r5, [%r2];
	st.global.b32 [ %rd2 + 0 ], { %r5 };
"""


def test_threads_run_apart_where_they_branch_and_meet_again() -> None:
    values = words()
    run(
        """
	setp.lt.s32 %p1, %r1, 10;
	mov.b32 %r4, 7;
	@%p1 bra $L__BB0_2;
	add.s32 %r4, %r1, 100;
	setp.gt.s32 %p2, %r1, 60;
	@%p2 bra $L__BB0_3;
$L__BB0_2:
	add.s32 %r4, %r4, 1;
$L__BB0_3:
	st.global.b32 [ %rd2 + 0 ], { %r4 };
""",
        values,
    )
    assert values.tolist() == [8] * 10 + list(range(111, 162)) + [161, 162, 163]


def test_a_loop_ends_for_each_thread_in_its_turn() -> None:
    values = words()
    body = (
        "\tmov.b32 %r4, 0;\n$L__BB0_1:\n\tadd.s32 %r4, %r4, 3;\n\tsetp.lt.s32 %p1, %r4, %r1;\n\t@%p1 bra $L__BB0_1;\n"
    )
    run(body + "\tst.global.b32 [ %rd2 + 0 ], { %r4 };", values)
    assert values.tolist() == [max(3, -(-i // 3) * 3) for i in range(64)]


def test_a_missing_barrier_is_found_though_the_result_would_be_right() -> None:
    values = words()
    run(SWAP.replace("BARRIER", "bar.sync 0;"), values)
    assert values.tolist() == [*range(32, 64), *range(32)]
    with pytest.raises(KernelFault, match="reads shared memory that another writes"):
        run(SWAP.replace("BARRIER", ""), words())


def test_a_copy_is_there_when_it_was_waited_for() -> None:
    values = words()
    run(COPY.replace("WAIT", "cp.async.wait_group 0;"), values)
    assert values.tolist() == words().tolist()
    run(COPY.replace("WAIT", "cp.async.wait_group 1;"), values)
    assert set(values.tolist()) == {-1}


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        ("\tld.global.b32 { %r4 }, [ %rd2 + 4 ];", "in no buffer"),
        ("\tld.global.v2.b32 { %r4, %r5 }, [ %rd1 + 4 ];", "not aligned"),
        ("\tst.shared.b32 [ %r2 + 4 ], %r1;", "outside"),
        ("\tsetp.lt.s32 %p1, %r1, 10;\n\t@%p1 bar.sync 0;", "not all threads"),
    ],
)
def test_what_a_device_would_trap_on_is_an_error(body: str, fault: str) -> None:
    with pytest.raises(KernelFault, match=fault):
        run(body, words())


@pytest.mark.timeout(900)
def test_the_kernels_machine_code_passes_their_tests() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    tests = [
        f"tests/unit/engine/test_triton_{file}.py::test_{name}"
        for file in KERNELS_TESTS
        for name in KERNELS_TESTS[file]
    ]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.emulation.ptx.plugin", "-p", "no:cacheprovider"]
    result = subprocess.run([*command, *tests], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-5000:]
