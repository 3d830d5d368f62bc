"""Compiles Triton's kernels for GPUs that are not there: launchers run on CPU tensors, and nothing is launched.

What a launch would run is compiled down to machine code with the very types, constants and options of the launch. Its
shared memory is held against the GPU's, and what of it does not fit into registers against next to nothing: a kernel
whose values lie in memory computes rightly, at a fraction of its speed.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from engine.kernels.triton import early
from tests.fakes.kernel_launches import launch_every_kernel

# Bytes of shared memory that one program may have, by compute capability.
SHARED_BYTES = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
_SHARED_OF_SYSTEM = 1024  # beside each program's
# Too large a tile makes thousands of them. What a decode in float32, without tensor cores, lacks is let pass.
_MAX_STACK_BYTES = 512
# What some kernels are slow without: copies of 16 bytes that nobody waits for, and a Hopper's matrix products.
_NEEDED = {"decode_kernel": "cp.async.cg.shared.global"}
_NEEDED_ON_HOPPER = {"prefill_kernel": "wgmma.mma_async", "linear_kernel": "wgmma.mma_async"}
_UNDER_WAY = r"cp\.async\.wait_group\s+[1-9]"  # copies that are not waited for yet while a tile is computed
_WITHOUT_EXCHANGE = ("glu_kernel", "qkv_kernel")  # threads of theirs would wait for each other through shared memory
_DECODES_AT_ONCE = 3  # in 16 bits on Hopper: while one begins or ends, others read
_OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion", "launch_pdl")
_TYPES = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.uint8: "*u8",
}


@dataclass(frozen=True, slots=True)
class CompiledKernel:
    """One launch's kernel."""

    name: str
    num_warps: int
    shared_bytes: int
    num_registers: int  # of a thread
    stack_bytes: int  # of a thread: what did not fit into its registers
    assembly: str
    is_early: bool  # its programs may begin before those of the kernel before it have ended

    @property
    def awaits_first(self) -> bool:
        """Whether it waits for the kernels before it, and accesses no memory but its parameters' until then."""
        before, wait, _ = self.assembly.partition("griddepcontrol.wait")
        return bool(wait) and not re.search(r"(ld|st|red|atom)\.global|cp\.async", before)

    def num_at_once(self, capability: int) -> int:
        """Programs that fit a multiprocessor together, by its shared memory and its registers."""
        by_shared = (SHARED_BYTES[capability] + _SHARED_OF_SYSTEM) // (self.shared_bytes + _SHARED_OF_SYSTEM)
        of_warp = -(-32 * self.num_registers // 256) * 256
        return min(by_shared, 65_536 // of_warp // self.num_warps)


@dataclass(frozen=True, slots=True)
class Launch:
    """A kernel with its arguments by name, and what of them is known to the compiler."""

    function: Any
    bound: dict[str, Any]
    constants: set[str]
    options: dict[str, int]

    @classmethod
    def of(cls, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> "Launch":
        options = {name: kwargs[name] for name in _OPTIONS if name in kwargs}
        bound = dict(zip(function.arg_names, args, strict=False))
        bound |= {name: value for name, value in kwargs.items() if name not in options}
        assert set(bound) == set(function.arg_names), "every argument is given"
        # As a launch has it: ones, unless nothing is to be known of them, and what is not there are constants.
        constants = {
            p.name
            for p in function.params
            if p.is_constexpr
            or bound[p.name] is None
            or (_is_specialized(p, bound[p.name]) and _number(bound[p.name]) == 1)
        }
        return cls(function, bound, constants, options)

    @property
    def name(self) -> str:
        return str(self.function.__name__)

    def signature(self) -> dict[str, str]:
        names = self.function.arg_names
        return {name: "constexpr" if name in self.constants else _type(self.bound[name]) for name in names}

    def values(self) -> dict[tuple[int], Any]:
        """Of the constants, by place."""
        return {(self.function.arg_names.index(name),): self.bound[name] for name in self.constants}

    def parameters(self) -> list[Any]:
        """What the machine code is given."""
        return [self.bound[name] for name in self.function.arg_names if name not in self.constants]

    def attributes(self) -> dict[Any, Any]:
        """What is promised to the compiler: pointers and integers that are multiples of 16."""
        return {
            (index,): [["tt.divisibility", 16]]
            for index, p in enumerate(self.function.params)
            if p.name not in self.constants
            and _is_specialized(p, self.bound[p.name])
            and _number(self.bound[p.name]) % 16 == 0
        }

    def key(self) -> tuple[Any, ...]:
        """Equal of launches with the same machine code."""
        signature, values, attributes = self.signature(), self.values(), self.attributes()
        return (self.name, *signature.items(), *sorted(values.items()), *attributes, *self.options.items())


def _is_specialized(parameter: Any, value: Any) -> bool:
    return not parameter.do_not_specialize and (torch.is_tensor(value) or type(value) is int)


def _number(value: Any) -> int:
    return int(value.data_ptr() if torch.is_tensor(value) else value)


def compiled(launch: Launch, capability: int) -> Any:
    """Triton's kernel. Raises what the compiler raises."""
    source = ASTSource(
        fn=launch.function, signature=launch.signature(), constexprs=launch.values(), attrs=launch.attributes()
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch.options)


@contextmanager
def compiled_launches(capability: int) -> Iterator[list[CompiledKernel]]:
    """The kernels that are launched meanwhile, each compiled; equal launches once. Raises what the compiler raises."""
    seen: set[tuple[Any, ...]] = set()
    found: list[CompiledKernel] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launch = Launch.of(self, args, kwargs)
        if launch.key() not in seen:
            seen.add(launch.key())
            kernel = compiled(launch, capability)
            registers, stack = _registers_and_stack(kernel.asm["cubin"])
            metadata = kernel.metadata
            found.append(
                CompiledKernel(
                    name=launch.name,
                    num_warps=metadata.num_warps,
                    shared_bytes=metadata.shared,
                    num_registers=registers,
                    stack_bytes=stack,
                    assembly=kernel.asm["ptx"],
                    is_early=bool(launch.options.get("launch_pdl")),
                )
            )

    JITFunction.run = compile_only
    try:
        yield found
    finally:
        JITFunction.run = run


def _registers_and_stack(machine_code: bytes) -> tuple[int, int]:
    """What the tool that Triton brings along says of it."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(machine_code)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", said)
    assert found is not None, said
    return int(found[1]), int(found[2])


def _type(value: Any) -> str:
    if torch.is_tensor(value):
        return _TYPES[value.dtype]
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    assert isinstance(value, float), f"no type for {value!r}"
    return "fp32"


def main() -> None:
    """Compile all for the GPU named by its compute capability; a line for each kernel, an error if one does not fit."""
    capability = int(sys.argv[1])
    setattr(early, "_is_early", lambda device: capability >= 90)  # noqa: B010
    with compiled_launches(capability) as compiled:
        launch_every_kernel()
    for kernel in compiled:
        print(
            kernel.name, kernel.shared_bytes, kernel.num_registers, kernel.stack_bytes, kernel.num_at_once(capability)
        )
    faults = list(_faults(compiled, capability))
    if faults:
        raise SystemExit("\n".join(faults))


def _faults(compiled: list[CompiledKernel], capability: int) -> Iterator[str]:
    """What would not run on the GPU, and what would run at a fraction of its speed."""
    for kernel in compiled:
        if kernel.shared_bytes > SHARED_BYTES[capability]:
            yield f"{kernel.name} needs too much shared memory: {kernel.shared_bytes}"
        if kernel.stack_bytes > _MAX_STACK_BYTES:
            yield f"{kernel.name} has too few registers: {kernel.stack_bytes} bytes are kept in memory"
        if kernel.is_early and not kernel.awaits_first:
            yield f"{kernel.name}, launched early, reads or writes before what is before it has ended"
        if kernel.name in _WITHOUT_EXCHANGE and kernel.shared_bytes:
            yield f"{kernel.name}: threads exchange what each could load"
        if (
            kernel.name == "prefill_kernel"
            and "wgmma" in kernel.assembly
            and not re.search(_UNDER_WAY, kernel.assembly)
        ):
            yield f"{kernel.name} waits for the keys and values of a tile as soon as it has asked for them"
    for name, words in (_NEEDED | (_NEEDED_ON_HOPPER if capability == 90 else {})).items():
        if not any(words in kernel.assembly for kernel in _of(compiled, name)):
            yield f"{name} lacks what makes it fast: {words}"
    if any(kernel.is_early for kernel in compiled) != (capability >= 90):
        yield "kernels are launched early where they cannot be, or none is where they can"
    if capability == 90:
        halves = [kernel for kernel in _of(compiled, "decode_kernel") if "mma.sync" in kernel.assembly]
        if not halves or min(kernel.num_at_once(capability) for kernel in halves) < _DECODES_AT_ONCE:
            yield "too few decodes fit a multiprocessor"


def _of(compiled: list[CompiledKernel], name: str) -> list[CompiledKernel]:
    return [kernel for kernel in compiled if kernel.name == name]


if __name__ == "__main__":
    main()
