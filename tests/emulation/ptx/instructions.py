"""What single instructions of PTX do, but for those of matrices (`matrices.py`).

Fused multiply-adds round once or, very rarely, twice; approximations, as of `ex2.approx`, are as exact as numpy.
"""

from collections.abc import Callable
from functools import partial

import numpy as np

from tests.emulation.ptx import accesses, matrices
from tests.emulation.ptx.machine import Machine, Mask, type_of
from tests.emulation.ptx.memory import Array
from tests.emulation.ptx.program import Instruction

Function = Callable[[Machine, Mask | None], None]


def function_of(instruction: Instruction) -> Function | None:
    """None: of a branch. Raises `NotImplementedError` for what no kernel had so far."""
    if instruction.name in ("bra", "ret"):
        return None
    make = _MAKERS.get(instruction.name)
    if make is None:
        raise NotImplementedError(instruction.text)
    return partial(make, instruction)


def bfloat16_bits(x: Array) -> Array:
    """float32 rounded to nearest even."""
    bits = x.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded).astype(np.uint16)


def widened(bits: Array) -> Array:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


# Arithmetic of equal types.


def _halves(function: Callable[..., Array], kind: str, values: list[Array]) -> Array:
    """Of two bfloat16, or two float16, in 32 bits."""
    pairs = [np.ascontiguousarray(value).view(np.uint16).reshape(-1, 2) for value in values]
    if kind == "bf16x2":
        return bfloat16_bits(function(*map(widened, pairs)).astype(np.float32)).reshape(-1).view(np.uint32)
    return (
        function(*(pair.view(np.float16).astype(np.float32) for pair in pairs))
        .astype(np.float16)
        .reshape(-1)
        .view(np.uint32)
    )


def _fma(a: Array, b: Array, c: Array) -> Array:
    wide = np.float64 if a.dtype == np.float32 else np.longdouble
    return (a.astype(wide) * b + c).astype(a.dtype)


def _quotient(a: Array, b: Array) -> Array:
    if a.dtype.kind == "f":
        return np.divide(a, b)
    wide = a.astype(np.int64)
    other = b.astype(np.int64)
    return np.asarray(np.sign(wide) * np.sign(other) * (abs(wide) // abs(other)), a.dtype)


_FUNCTIONS: dict[str, Callable[..., Array]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "fma": _fma,
    "div": _quotient,
    "rem": lambda a, b: a - _quotient(a, b) * b,
    "max": np.fmax,  # the other one where one is NaN
    "min": np.fmin,
    "neg": lambda a: -a,
    "abs": abs,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.invert,
    "sqrt": np.sqrt,
    "rsqrt": lambda a: 1 / np.sqrt(a),
    "rcp": lambda a: 1 / a,
    "ex2": np.exp2,
    "lg2": np.log2,
    "tanh": np.tanh,
}


def _plain(instruction: Instruction, m: Machine, mask: Mask | None) -> None:
    kind = instruction.modifiers[-1]
    target, *operands = instruction.operands
    if instruction.name == "not" and kind != "pred":
        kind = kind.replace("b", "u")
    values = [m.read(operand, kind) for operand in operands]
    function = _FUNCTIONS[instruction.name]
    if instruction.name in ("max", "min") and "NaN" in instruction.modifiers:
        function = np.maximum if instruction.name == "max" else np.minimum
    if kind.endswith("x2"):
        m.write(target, _halves(function, kind, values), mask)
    elif kind == "bf16":
        m.write(target, bfloat16_bits(function(*map(widened, values)).astype(np.float32)), mask)
    else:
        m.write(target, function(*values).astype(type_of(kind)), mask)


def _multiply(instruction: Instruction, m: Machine, mask: Mask | None) -> None:
    """mul and mad: of the whole product the low half, the high one, or all of it."""
    kind, (target, *operands) = instruction.modifiers[-1], instruction.operands
    part = instruction.modifiers[0]
    if part not in ("lo", "hi", "wide"):
        return _plain(instruction, m, mask)
    dtype = type_of(kind)
    a, b = (m.read(operand, kind) for operand in operands[:2])
    if part == "lo":
        product = a * b
    else:
        if dtype.itemsize > 4:
            product = np.array([int(x) * int(y) >> 64 for x, y in zip(a, b, strict=True)]).astype(dtype)
        else:
            wide = np.dtype(f"{dtype.kind}{2 * dtype.itemsize}")
            product = a.astype(wide) * b.astype(wide)
            if part == "hi":
                product = (product >> wide.type(8 * dtype.itemsize)).astype(dtype)
    if instruction.name == "mad":
        product = product + m.read(operands[2], f"{kind[0]}{8 * product.itemsize}")
    m.write(target, product, mask)


def _shift(instruction: Instruction, m: Machine, mask: Mask | None) -> None:
    kind = instruction.modifiers[-1]
    target, value, count = instruction.operands
    a, n = m.read(value, kind), m.read(count, "u32")
    bits = 8 * a.itemsize
    if instruction.name == "shl":
        result = np.where(n >= bits, 0, a << np.minimum(n, bits - 1).astype(a.dtype))
    else:
        all_out = np.where(a < 0, -1, 0) if a.dtype.kind == "i" else np.zeros_like(a)
        result = np.where(n >= bits, all_out, a >> np.minimum(n, bits - 1).astype(a.dtype))
    m.write(target, result.astype(a.dtype), mask)


def _field(instruction: Instruction, m: Machine, mask: Mask | None) -> None:
    """bfe: some bits of a value, those of a signed one with its sign."""
    kind = instruction.modifiers[-1]
    target, value, begin, length = instruction.operands
    assert isinstance(begin, int) and isinstance(length, int)
    a = m.read(value, kind)
    bits = 8 * a.itemsize
    left = bits - begin - length
    m.write(target, (a << a.dtype.type(left)) >> a.dtype.type(bits - length), mask)


def _permute(instruction: Instruction, m: Machine, mask: Mask | None) -> None:
    """prmt: four bytes of eight."""
    target, a, b, selector = instruction.operands
    pool = np.stack([np.ascontiguousarray(m.read(x, "u32")).view(np.uint8).reshape(-1, 4) for x in (a, b)], 1).reshape(
        -1, 8
    )
    chosen = m.read(selector, "u32")
    out = np.empty((m.num_threads, 4), np.uint8)
    for i in range(4):
        nibble = (chosen >> np.uint32(4 * i)) & np.uint32(15)
        byte = pool[np.arange(m.num_threads), nibble & 7]
        out[:, i] = np.where(nibble & 8, np.where(byte & 0x80, 0xFF, 0), byte)
    m.write(target, out.reshape(-1).view(np.uint32), mask)


def _count_bits(instruction: Instruction, m: Machine, mask: Mask | None) -> None:
    target, value = instruction.operands
    m.write(target, np.bitwise_count(m.read(value, "u32")).astype(np.uint32), mask)


# Choices.

_COMPARISONS: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}


def _compare(instruction: Instruction, m: Machine, mask: Mask | None) -> None:
    """setp; where a value is NaN, true only of the comparisons that end in u."""
    name, *combined, kind = (x for x in instruction.modifiers if x != "ftz")
    target, x, y, *more = instruction.operands
    a, b = m.read(x, kind), m.read(y, kind)
    if a.dtype.kind == "f":
        is_nan = np.isnan(a) | np.isnan(b)
        if name in ("num", "nan"):
            result = is_nan == (name == "nan")
        elif name in _COMPARISONS:
            result = _COMPARISONS[name](a, b) & ~is_nan
        else:
            result = _COMPARISONS[name[:-1]](a, b) | is_nan
    else:
        result = _COMPARISONS[{"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}.get(name, name)](a, b)
    if combined:
        other = m.read(more[0], "pred")
        result = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[combined[0]](result, other)
    m.write(target, result, mask)


def _select(instruction: Instruction, m: Machine, mask: Mask | None) -> None:
    kind = instruction.modifiers[-1]
    target, a, b, chosen = instruction.operands
    m.write(target, np.where(m.read(chosen, "pred"), m.read(a, kind), m.read(b, kind)), mask)


def _move(instruction: Instruction, m: Machine, mask: Mask | None) -> None:
    target, value = instruction.operands
    m.write(target, m.read(value, instruction.modifiers[-1]), mask)


_ROUNDINGS: dict[str, Callable[[Array], Array]] = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}


def _convert(instruction: Instruction, m: Machine, mask: Mask | None) -> None:
    *how, to, source = instruction.modifiers
    target, *operands = instruction.operands
    values = [m.read(operand, source) for operand in operands]
    if to.endswith("x2"):
        high, low = (bfloat16_bits(x) if to == "bf16x2" else x.astype(np.float16).view(np.uint16) for x in values)
        m.write(target, np.stack([low, high], 1).reshape(-1).view(np.uint32), mask)
        return
    (value,) = values
    if source == "bf16":
        value = widened(value)
    if to == "bf16":
        m.write(target, bfloat16_bits(value.astype(np.float32)), mask)
        return
    if rounded := [_ROUNDINGS[x] for x in how if x in _ROUNDINGS]:
        value = rounded[0](value)
        if type_of(to).kind != "f":
            limits = np.iinfo(type_of(to).name)
            value = np.clip(np.nan_to_num(value.astype(np.float64)), limits.min, limits.max)
    m.write(target, value.astype(type_of(to)), mask)


def _nothing(instruction: Instruction, m: Machine, mask: Mask | None) -> None:
    pass


_MAKERS: dict[str, Callable[[Instruction, Machine, Mask | None], None]] = {
    **dict.fromkeys(_FUNCTIONS, _plain),
    "mul": _multiply,
    "mad": _multiply,
    "shl": _shift,
    "shr": _shift,
    "bfe": _field,
    "prmt": _permute,
    "popc": _count_bits,
    "setp": _compare,
    "selp": _select,
    "mov": _move,
    "cvt": _convert,
    "ld": accesses.load,
    "st": accesses.store,
    "cp": accesses.copy,
    "bar": accesses.barrier,
    "fence": _nothing,
    "shfl": matrices.shuffle,
    "redux": matrices.reduce,
    "vote": matrices.vote,
    "ldmatrix": matrices.load_matrices,
    "stmatrix": matrices.store_matrices,
    "mma": matrices.multiply,
    "wgmma": matrices.multiply_wide,
}
