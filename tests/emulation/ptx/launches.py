"""Launches of Triton's kernels compiled for a GPU that is not there, and run instruction by instruction."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from triton.runtime.jit import JITFunction

from tests.emulation.ptx.instructions import Function, function_of
from tests.emulation.ptx.machine import Machine, type_of
from tests.emulation.ptx.memory import GlobalMemory, KernelFault, SharedMemory
from tests.emulation.ptx.program import Program, read_program
from tests.fakes.triton_compiler import Launch, compiled

Loaded = tuple[Program, list[Function | None]]


@contextmanager
def emulated_launches(capability: int) -> Iterator[dict[str, int]]:
    """What is launched meanwhile runs; yields the number of launches of each kernel. Raises `KernelFault`."""
    programs: dict[str, Loaded] = {}
    counts: dict[str, int] = {}
    run = JITFunction.run

    def run_here(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launch = Launch.of(self, args, kwargs)
        kernel = compiled(launch, capability)
        if kernel.asm["ptx"] not in programs:
            program = read_program(kernel.asm["ptx"])
            programs[kernel.asm["ptx"]] = program, [function_of(instruction) for instruction in program.instructions]
        counts[self.__name__] = counts.get(self.__name__, 0) + 1
        _run(programs[kernel.asm["ptx"]], launch, kernel.metadata, (*grid, 1, 1)[:3])

    JITFunction.run = run_here
    try:
        yield counts
    finally:
        JITFunction.run = run


def _run(loaded: Loaded, launch: Launch, metadata: Any, grid: tuple[int, int, int]) -> None:
    program, functions = loaded
    values = launch.parameters()
    tensors = [value for value in values if torch.is_tensor(value)]
    memory = GlobalMemory([(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) for t in tensors])
    parameters: dict[str, Any] = {}
    for (kind, name), value in zip(program.parameters, [*values, 0, 0], strict=True):  # two of Triton's own behind
        number = value.data_ptr() if torch.is_tensor(value) else value
        parameters[name] = np.array(number).astype(type_of(kind))[()]
    with np.errstate(all="ignore"):
        for z in range(grid[2]):
            for y in range(grid[1]):
                for x in range(grid[0]):
                    shared = SharedMemory(metadata.shared)
                    machine = Machine(program, 32 * metadata.num_warps, shared, memory, parameters, (x, y, z), grid)
                    try:
                        machine.run(functions)
                    except KernelFault as fault:
                        raise KernelFault(f"{launch.name}, program {x, y, z} of {grid}: {fault}") from None
