"""Loads, stores, asynchronous copies and barriers of PTX."""

import numpy as np

from tests.emulation.ptx.machine import Machine, Mask, type_of
from tests.emulation.ptx.memory import Array, KernelFault
from tests.emulation.ptx.program import Address, Instruction


def _shape(modifiers: tuple[str, ...]) -> tuple[int, str]:
    """Values of an access, and the type of each."""
    count = next((int(x[1:]) for x in modifiers if x in ("v2", "v4", "v8")), 1)
    return count, modifiers[-1]


def _places(m: Machine, operand: object, kind: str) -> Array:
    assert isinstance(operand, Address)
    return np.add(m.read(operand.base, kind), type_of(kind).type(operand.offset))


def load(instruction: Instruction, m: Machine, mask: Mask | None) -> None:
    target, source = instruction.operands
    assert isinstance(source, Address)
    count, kind = _shape(instruction.modifiers)
    targets = target if isinstance(target, tuple) else (target,)
    if instruction.modifiers[0] == "param":
        value = m.parameters[source.base]
        m.write(target, np.full(m.num_threads, value).view(type_of(kind)), mask)
        return
    active = np.ones(m.num_threads, np.bool_) if mask is None else mask
    dtype = type_of(kind)
    width = dtype.itemsize
    if instruction.modifiers[0] == "global":
        words = m.memory.load(_places(m, source, "u64")[active], width, count)
    else:
        assert instruction.modifiers[0] == "shared"
        loaded = m.shared.load(_places(m, source, "u32").astype(np.int64)[active], width * count, m.warps[active])
        words = [
            np.ascontiguousarray(loaded[:, i * width : (i + 1) * width]).view(f"u{width}")[:, 0] for i in range(count)
        ]
    for register, word in zip(targets, words, strict=True):
        whole = np.zeros(m.num_threads, f"u{width}")
        whole[active] = word
        m.write(register, whole.view(dtype), mask)


def store(instruction: Instruction, m: Machine, mask: Mask | None) -> None:
    place, source = instruction.operands
    count, kind = _shape(instruction.modifiers)
    sources = source if isinstance(source, tuple) else (source,)
    active = np.ones(m.num_threads, np.bool_) if mask is None else mask
    width = type_of(kind).itemsize
    values = [m.read(each, f"u{8 * width}")[active] for each in sources]
    assert len(values) == count
    if instruction.modifiers[0] == "global":
        m.memory.store(_places(m, place, "u64")[active], values)
    else:
        together = np.stack(values, 1).view(np.uint8)
        m.shared.store(_places(m, place, "u32").astype(np.int64)[active], together, m.warps[active])


def copy(instruction: Instruction, m: Machine, mask: Mask | None) -> None:
    """cp.async: into shared memory; what is not read of the source is zero."""
    name = instruction.modifiers[1]
    if name == "commit_group":
        m.shared.commit()
    elif name == "wait_group":
        assert isinstance(instruction.operands[0], int)
        m.shared.wait(instruction.operands[0])
    else:
        target, source, size, *rest = instruction.operands
        assert isinstance(size, int)
        active = np.ones(m.num_threads, np.bool_) if mask is None else mask
        addresses = _places(m, source, "u64")[active]
        num_read = m.read(rest[0], "u32")[active] if rest else np.full(len(addresses), size)
        if not np.isin(num_read, (0, size)).all():
            raise KernelFault("a copy of a part")
        values = np.zeros((len(addresses), size), np.uint8)
        is_read = num_read == size
        words = m.memory.load(addresses[is_read], 4, size // 4)
        if (addresses[is_read] % np.uint64(size)).any():
            raise KernelFault("a copy's source is not aligned")
        values[is_read] = np.stack(words, 1).view(np.uint8) if is_read.any() else 0
        m.shared.begin_copy(_places(m, target, "u32").astype(np.int64)[active], values, m.warps[active])


def barrier(instruction: Instruction, m: Machine, mask: Mask | None) -> None:
    if mask is not None:
        raise KernelFault("a barrier that not all threads come to")
    m.shared.barrier()
