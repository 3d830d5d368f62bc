"""Runs one program of a kernel: all its threads at once, instruction by instruction.

Threads that branch apart are run on where the lowest of them are, until they meet again.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from tests.emulation.ptx.memory import Array, GlobalMemory, KernelFault, SharedMemory
from tests.emulation.ptx.program import Program

Mask = NDArray[np.bool_]
_TYPES = {
    **{
        f"{kind}{bits}": np.dtype(f"{letter}{bits // 8}")
        for kind, letter in (("u", "u"), ("s", "i"), ("b", "u"))
        for bits in (8, 16, 32, 64)
    },
    "f16": np.dtype(np.float16),
    "f32": np.dtype(np.float32),
    "f64": np.dtype(np.float64),
    "bf16": np.dtype(np.uint16),
    "f16x2": np.dtype(np.uint32),
    "bf16x2": np.dtype(np.uint32),
    "pred": np.dtype(np.bool_),
}


def type_of(name: str) -> "np.dtype[np.generic]":
    return _TYPES[name]


@dataclass(slots=True)
class Machine:
    """One program in the making."""

    program: Program
    num_threads: int
    shared: SharedMemory
    memory: GlobalMemory
    parameters: dict[str, np.generic]
    program_id: tuple[int, int, int]
    grid: tuple[int, int, int]
    registers: dict[str, Array] = field(default_factory=dict)
    lanes: Array = field(init=False)
    warps: Array = field(init=False)

    def __post_init__(self) -> None:
        threads = np.arange(self.num_threads)
        self.lanes, self.warps = threads % 32, threads // 32
        for prefix, (kind, count) in self.program.registers.items():
            for i in range(count):  # whatever lay there
                noise = np.full(self.num_threads, 0xFF, np.uint8).repeat(type_of(kind).itemsize)
                self.registers[f"{prefix}{i}"] = (
                    noise.view(type_of(kind)) if kind != "pred" else noise[: self.num_threads] > 0
                )

    def read(self, operand: object, kind: str) -> Array:
        """An operand as values of a type, one a thread."""
        dtype = type_of(kind)
        if isinstance(operand, tuple):  # packed, the lowest first
            parts = np.stack([self.read(part, f"b{8 * dtype.itemsize // len(operand)}") for part in operand], 1)
            return parts.reshape(-1).view(dtype)
        if isinstance(operand, str):
            if (register := self.registers.get(operand)) is not None:
                if register.dtype == dtype:
                    return register
                if register.itemsize == dtype.itemsize:
                    return register.view(dtype)
                return register.view(f"u{register.itemsize}").astype(f"u{dtype.itemsize}").view(dtype)
            return np.full(self.num_threads, self._special(operand)).astype(dtype)
        if isinstance(operand, int):
            if dtype == np.bool_:
                return np.full(self.num_threads, operand != 0)
            value = np.array([operand & ((1 << 8 * dtype.itemsize) - 1)], f"u{dtype.itemsize}").view(dtype)
            return np.broadcast_to(value, self.num_threads)
        return np.broadcast_to(np.asarray(operand).reshape(1).view(dtype), self.num_threads)

    def write(self, operand: object, values: Array, mask: Mask | None) -> None:
        """Into a register, or into several that are packed."""
        if isinstance(operand, tuple):
            width = values.itemsize // len(operand)
            parts = np.ascontiguousarray(values).view(f"u{width}").reshape(self.num_threads, len(operand))
            for i, part in enumerate(operand):
                self.write(part, parts[:, i], mask)
            return
        if operand == "_":
            return
        assert isinstance(operand, str)
        before = self.registers[operand]
        values = np.broadcast_to(values, self.num_threads)
        if values.itemsize < before.itemsize:
            letter = "i" if values.dtype.kind == "i" else "u"
            values = values.view(f"{letter}{values.itemsize}").astype(f"{letter}{before.itemsize}")
        if values.dtype != before.dtype:
            values = np.ascontiguousarray(values).view(before.dtype)
        self.registers[operand] = values if mask is None else np.where(mask, values, before)

    def _special(self, name: str) -> int | Array:
        if name == "%tid.x":
            return np.arange(self.num_threads)
        if name == "global_smem":
            return 0
        axis = "xyz".index(name[-1])
        return {"%ctaid": self.program_id, "%nctaid": self.grid, "%ntid": (self.num_threads, 1, 1)}[name[:-2]][axis]

    def run(self, functions: list[Callable[["Machine", Mask | None], None] | None]) -> None:
        """functions: of the instructions, but for branches."""
        groups: dict[int, Mask] = {0: np.ones(self.num_threads, np.bool_)}
        while groups:
            place = min(groups)
            active = groups.pop(place)
            end = min(groups, default=len(functions) + 1)
            while place < end:
                if place >= len(functions):
                    break
                instruction = self.program.instructions[place]
                mask: Mask | None = None if active.all() else active
                if instruction.predicate is not None:
                    chosen = self.registers[instruction.predicate] ^ instruction.is_negated
                    if not chosen.all():
                        mask = chosen & active
                if instruction.name == "ret":
                    active = active & ~(active if mask is None else mask)
                    if not active.any():
                        break
                elif instruction.name == "bra":
                    taken = active if mask is None else mask
                    target = self.program.labels[str(instruction.operands[0])]
                    if (taken == active).all():
                        _join(groups, target, active)
                        active = np.zeros_like(active)
                        break
                    if taken.any():
                        _join(groups, target, taken)
                        active = active & ~taken
                        end = min(end, target) if target > place else place + 1
                elif mask is None or mask.any():
                    function = functions[place]
                    assert function is not None
                    try:
                        function(self, mask)
                    except KernelFault as fault:
                        raise KernelFault(f"{fault}: {instruction.text}") from None
                place += 1
            if active.any() and place < len(functions):
                _join(groups, place, active)


def _join(groups: dict[int, Mask], place: int, mask: Mask) -> None:
    groups[place] = groups[place] | mask if place in groups else mask
