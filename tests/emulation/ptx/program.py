"""PTX as Triton makes it, read into instructions: one kernel a text, no calls, no local memory."""

import re
import struct
from dataclasses import dataclass

import numpy as np

_STATEMENT = re.compile(r"(?:@(!?)(%p\d+)\s+)?([a-z][\w.:]*)\s*(.*)", re.DOTALL)
_PARAMETER = re.compile(r"\.param\s+\.(\w+)[^,()]*?\s(\w+_param_\d+)")
_REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+(%\w+)<(\d+)>")


@dataclass(frozen=True, slots=True)
class Address:
    """`[base + offset]`."""

    base: str
    offset: int


@dataclass(frozen=True, slots=True)
class Instruction:
    predicate: str | None
    is_negated: bool
    name: str
    modifiers: tuple[str, ...]
    operands: tuple[object, ...]
    text: str


@dataclass(frozen=True, slots=True)
class Program:
    instructions: list[Instruction]
    labels: dict[str, int]  # to the instruction behind each
    parameters: list[tuple[str, str]]  # type and name
    registers: dict[str, tuple[str, int]]  # by prefix: type and number


def read_program(text: str) -> Program:
    """The only kernel of a text."""
    text = re.sub(r"//[^\n]*", "", text)
    text = re.sub(r"\{ \.reg \.b32 tmp; ([^;]*); \}", lambda found: f"{found[1].replace('tmp', '_')};", text)
    start = text.index(".visible .entry")
    head, _, rest = text[start:].partition("{")
    body = rest[: rest.index("\n}")]
    registers = {prefix: (kind, int(count)) for kind, prefix, count in _REGISTERS.findall(body)}
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for part in body.split(";"):
        lines = []
        for line in part.split("\n"):
            line = line.strip()
            if line.endswith(":"):
                labels[line[:-1]] = len(instructions)
            elif line and not line.startswith("."):
                lines.append(line)
        statement = " ".join(lines)
        if not statement:
            continue
        found = _STATEMENT.fullmatch(statement)
        assert found is not None, f"no instruction: {statement!r}"
        negation, predicate, name, operands = found.groups()
        name, *modifiers = name.split(".")
        read = tuple(map(_operand, _split(operands)))
        instructions.append(Instruction(predicate, bool(negation), name, tuple(modifiers), read, statement))
    return Program(instructions, labels, _PARAMETER.findall(head), registers)


def _split(text: str) -> list[str]:
    """At the commas outside of brackets."""
    parts, depth, last = [], 0, 0
    for place, character in enumerate(text):
        depth += (character in "[{") - (character in "]}")
        if character == "," and not depth:
            parts.append(text[last:place])
            last = place + 1
    return [part.strip() for part in (*parts, text[last:]) if part.strip()]


def _operand(text: str) -> object:
    if text.startswith("{"):
        return tuple(map(_operand, _split(text[1:-1])))
    if text.startswith("["):
        base, _, offset = text[1:-1].partition("+")
        return Address(base.strip(), int(offset, 0) if offset.strip() else 0)
    if text.startswith("0f"):
        return np.frombuffer(struct.pack("<I", int(text[2:], 16)), np.float32)[0]
    if text.startswith("0d"):
        return np.frombuffer(struct.pack("<Q", int(text[2:], 16)), np.float64)[0]
    if re.fullmatch(r"-?(0x[\da-fA-F]+|\d+)U?", text):
        return int(text.rstrip("U"), 0)
    return text
