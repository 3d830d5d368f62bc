"""What a warp's threads do together: values handed round, and products of matrices.

Layouts are those of the PTX ISA: a thread of a warp's 8 by 8 matrix of 16-bit values has two of a row.
"""

from collections.abc import Callable

import numpy as np

from tests.emulation.ptx.machine import Machine, Mask, type_of
from tests.emulation.ptx.memory import Array
from tests.emulation.ptx.program import Address, Instruction


def shuffle(instruction: Instruction, m: Machine, mask: Mask | None) -> None:
    target, value, by, clamp, _ = instruction.operands
    values, shift = m.read(value, "b32").reshape(-1, 32), m.read(by, "u32").astype(np.int64).reshape(-1, 32)
    lanes = np.broadcast_to(np.arange(32), values.shape)
    mode = instruction.modifiers[1]
    if clamp not in (0, 31):
        raise NotImplementedError(instruction.text)
    source = {"bfly": lanes ^ shift, "idx": shift & 31, "up": lanes - shift, "down": lanes + shift}[mode]
    source = np.where((source < 0) | (source > 31), lanes, source)
    m.write(target, np.take_along_axis(values, source, 1).reshape(-1), mask)


def reduce(instruction: Instruction, m: Machine, mask: Mask | None) -> None:
    _, how, kind = instruction.modifiers
    target, value, _ = instruction.operands
    functions: dict[str, Callable[..., Array]] = {"min": np.min, "max": np.max, "add": np.sum}
    results = functions[how](m.read(value, kind).reshape(-1, 32), axis=1).astype(type_of(kind))
    m.write(target, results.repeat(32), mask)


def vote(instruction: Instruction, m: Machine, mask: Mask | None) -> None:
    target, value, _ = instruction.operands
    if "ballot" not in instruction.modifiers:
        raise NotImplementedError(instruction.text)
    bits = m.read(value, "pred").reshape(-1, 32).astype(np.uint64) << np.arange(32, dtype=np.uint64)
    m.write(target, bits.sum(1).astype(np.uint32).repeat(32), mask)


def _rows(instruction: Instruction, m: Machine, place: object, count: int) -> Array:
    """Where the rows of each warp's matrices begin: `[num_warps, count, 8]`, as its first threads say."""
    assert isinstance(place, Address)
    addresses = m.read(place.base, "u32").astype(np.int64) + place.offset
    return addresses.reshape(-1, 32)[:, : 8 * count].reshape(-1, count, 8)


def _count(instruction: Instruction) -> int:
    return int(next(x for x in instruction.modifiers if x in ("x1", "x2", "x4"))[1:])


def load_matrices(instruction: Instruction, m: Machine, mask: Mask | None) -> None:
    targets, place = instruction.operands
    count = _count(instruction)
    rows = _rows(instruction, m, place, count)
    warps = np.arange(len(rows)).repeat(8 * count)
    values = m.shared.load(rows.reshape(-1), 16, warps).view(np.uint16).reshape(len(rows), count, 8, 8)
    if "trans" in instruction.modifiers:
        values = values.swapaxes(2, 3)
    words = np.ascontiguousarray(values).view(np.uint32).reshape(len(rows), count, 32)
    assert isinstance(targets, tuple)
    for i, target in enumerate(targets):
        m.write(target, words[:, i].reshape(-1), mask)


def store_matrices(instruction: Instruction, m: Machine, mask: Mask | None) -> None:
    place, sources = instruction.operands
    count = _count(instruction)
    rows = _rows(instruction, m, place, count)
    assert isinstance(sources, tuple)
    words = np.stack([m.read(source, "b32").reshape(-1, 32) for source in sources], 1)  # [num_warps, count, 32]
    values = words.view(np.uint16).reshape(len(rows), count, 8, 8)
    if "trans" in instruction.modifiers:
        values = values.swapaxes(2, 3)
    together = np.ascontiguousarray(values).view(np.uint8).reshape(-1, 16)
    warps = np.arange(len(rows)).repeat(8 * count)
    if mask is None:
        m.shared.store(rows.reshape(-1), together, warps)
    else:
        chosen = mask.reshape(-1, 32)[:, 0].repeat(8 * count)
        m.shared.store(rows.reshape(-1)[chosen], together[chosen], warps[chosen])


def _numbers(words: Array, kind: str) -> Array:
    """Pairs of 16-bit floats as float64 `[..., 2 * last]`."""
    halves = np.ascontiguousarray(words).view(np.uint16)
    if kind == "bf16":
        return (halves.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)
    return halves.view(np.float16).astype(np.float64)


def _fragments(m: Machine, registers: object, kind: str) -> Array:
    """A's 16 by 16 of every warp, float64 `[num_warps, 16, 16]`, from four registers."""
    assert isinstance(registers, tuple) and len(registers) == 4
    quarters = [_numbers(m.read(r, "b32").reshape(-1, 8, 4), kind) for r in registers]  # [num_warps, 8, 8] each
    return np.concatenate([np.concatenate(quarters[0::2], 2), np.concatenate(quarters[1::2], 2)], 1)


def _accumulator(m: Machine, registers: tuple[object, ...]) -> Array:
    """C's 16 by n of every warp, float32."""
    columns = []
    for i in range(0, len(registers), 4):
        pairs = [m.read(r, "f32").reshape(-1, 8, 4) for r in registers[i : i + 4]]
        upper, lower = (np.stack(pairs[j : j + 2], 3).reshape(-1, 8, 8) for j in (0, 2))
        columns.append(np.concatenate([upper, lower], 1))
    return np.concatenate(columns, 2)


def _write_accumulator(m: Machine, registers: tuple[object, ...], values: Array, mask: Mask | None) -> None:
    for i in range(0, len(registers), 4):
        part = values[:, :, 2 * i : 2 * i + 8]
        for j, register in enumerate(registers[i : i + 4]):
            rows = part[:, 8 * (j // 2) : 8 * (j // 2) + 8]
            m.write(register, np.ascontiguousarray(rows[:, :, j % 2 :: 2]).reshape(-1), mask)


def multiply(instruction: Instruction, m: Machine, mask: Mask | None) -> None:
    """mma.m16n8k16 of 16-bit floats."""
    if "m16n8k16" not in instruction.modifiers:
        raise NotImplementedError(instruction.text)
    kind = instruction.modifiers[-2]
    targets, a, b, c = instruction.operands
    assert isinstance(b, tuple) and isinstance(c, tuple) and isinstance(targets, tuple)
    left = _fragments(m, a, kind)
    right = np.concatenate([_numbers(m.read(r, "b32").reshape(-1, 8, 4), kind) for r in b], 2)  # [num_warps, n, k]
    total = _accumulator(m, c) + left @ right.swapaxes(1, 2)
    _write_accumulator(m, targets, total.astype(np.float32), mask)


def _matrix_at(m: Machine, descriptor: int, num_rows: int, is_transposed: bool, kind: str) -> Array:
    """Of 16 columns (K) and so many rows that lie in shared memory, float64 `[num_rows, 16]`."""
    start, leading, stride = ((descriptor >> at & 0x3FFF) << 4 for at in (0, 16, 32))
    swizzle = {1: 7, 2: 3, 3: 1}.get(descriptor >> 62)  # bits of the address that are changed
    if swizzle is None:
        raise NotImplementedError("a matrix without swizzle")
    width = 16 * (swizzle + 1)  # bytes of an atom's row, of which it has eight
    row, k = np.arange(num_rows)[:, None], np.arange(16)[None, :]
    if is_transposed:  # rows lie side by side, K one below the other
        places = row * 2 // width * leading + k // 8 * stride + k % 8 * width + row * 2 % width
    else:
        places = row // 8 * stride + row % 8 * width + k * 2
    places = (places + start).reshape(-1)
    values = m.shared.load_for_product(places ^ ((places >> 7 & swizzle) << 4))
    return _numbers(values.view(np.uint32), kind).reshape(num_rows, 16)


def multiply_wide(instruction: Instruction, m: Machine, mask: Mask | None) -> None:
    """wgmma.m64nNk16 of 16-bit floats by groups of four warps. Its sums are there at once."""
    name = instruction.modifiers[0]
    if name == "commit_group":
        m.shared.commit_products()
    elif name == "wait_group":
        assert isinstance(instruction.operands[0], int)
        m.shared.wait_for_products(instruction.operands[0])
    elif name == "mma_async":
        _multiply_wide(instruction, m, mask)


def _multiply_wide(instruction: Instruction, m: Machine, mask: Mask | None) -> None:
    shape, kind = next(x for x in instruction.modifiers if x.startswith("m64")), instruction.modifiers[-1]
    num_columns = int(shape[4:].partition("k")[0])
    targets, a, b, scale, *flags = instruction.operands  # the flags: two signs, and of what lies in memory its order
    assert isinstance(targets, tuple)
    if flags[:2] != [1, 1]:
        raise NotImplementedError(instruction.text)
    keeps = m.read(scale, "pred") if isinstance(scale, str) else np.full(m.num_threads, scale != 0)
    before = np.where(keeps[::32, None, None], _accumulator(m, targets), 0)
    sums = np.empty(before.shape, np.float64)
    for group in range(len(before) // 4):
        warps, first = slice(4 * group, 4 * group + 4), 128 * group
        right = _matrix_at(m, int(m.read(b, "u64")[first]), num_columns, bool(flags[-1]), kind)
        if isinstance(a, tuple):
            left = _fragments(m, a, kind)[warps]
        else:
            left = _matrix_at(m, int(m.read(a, "u64")[first]), 64, bool(flags[2]), kind).reshape(4, 16, 16)
        sums[warps] = left @ right.T
    _write_accumulator(m, targets, (before + sums).astype(np.float32), mask)
