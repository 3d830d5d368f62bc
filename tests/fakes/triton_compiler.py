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

# Bytes of shared memory that one program may have, by compute capability.
SHARED_BYTES = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
_SHARED_OF_SYSTEM = 1024  # beside each program's
# Too large a tile makes thousands of them. What a decode in float32, without tensor cores, lacks is let pass.
_MAX_STACK_BYTES = 512
# What some kernels are slow without: copies of 16 bytes that nobody waits for, and a Hopper's matrix products.
_NEEDED = {"decode_kernel": "cp.async.cg.shared.global"}
_NEEDED_ON_HOPPER = {"prefill_kernel": "wgmma.mma_async", "linear_kernel": "wgmma.mma_async"}
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


def launch_every_kernel() -> None:
    """Launch all kernels as models of common shapes do."""
    from engine.attention.base import AttentionRules
    from engine.attention.triton_backend import TritonAttention
    from tests.fakes.paged_batches import PagedWorld

    for num_heads, num_kv_heads, head_dim, dtype in _ATTENTIONS:
        world = PagedWorld.build(
            [600, 40], num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, dtype=dtype
        )
        rules = AttentionRules(0.1)
        if head_dim != 128:
            rules = AttentionRules(0.1, sliding_window=100, softcap=20.0, sinks=torch.zeros(num_heads))
        decodes = [[(0, 599, 600), (1, 39, 40)], [(1, 39, 40)]]  # in splits, and in one
        for parts in ([(0, 0, 599), (1, 0, 39)], *decodes, [(0, 599, 600), (1, 0, 39)]):
            q, k, v, batch = world.step(parts)
            batch.is_open = batch.max_query_len > 1 and parts[0][1] > 0  # as a graph of mixed steps is
            for is_deterministic in (False, True):
                TritonAttention(deterministic=is_deterministic).forward(q, k, v, world.kv_cache, batch, rules)
    world = PagedWorld.build([40] * 140, num_heads=16, num_kv_heads=8, head_dim=128, dtype=torch.bfloat16)
    q, k, v, batch = world.step([(i, 39, 40) for i in range(140)])  # so many that their tiles are larger
    TritonAttention().forward(q, k, v, world.kv_cache, batch, AttentionRules(0.1))
    for dtype in (torch.bfloat16, torch.float32):
        _launch_rows(dtype)
    _launch_sampler()


_ATTENTIONS = [
    # num_heads, num_kv_heads, head_dim, dtype
    (32, 8, 128, torch.bfloat16),
    (16, 8, 128, torch.bfloat16),
    (32, 8, 128, torch.float32),
    (9, 3, 64, torch.float16),
    (8, 4, 256, torch.bfloat16),
]


def _launch_rows(dtype: torch.dtype) -> None:
    from engine.attention.base import PageSlots
    from engine.model.norm_rule import NormRule
    from engine.model.triton_linear import TritonLinear
    from engine.model.triton_rows import HeadNorms, TritonRows

    rows, rule = TritonRows(), NormRule(1e-6, False, True)
    x, weight = torch.zeros(4, 1024, dtype=dtype), torch.zeros(1024, dtype=dtype)
    rows.norm(x, x, weight, NormRule(1e-6, True, False))
    rows.add_norm(x, x, weight, rule)
    rows.glu(x, is_gelu=False)
    rows.glu(x, is_gelu=True)
    merged, angles = torch.zeros(4, 48 * 128, dtype=dtype), torch.zeros(4, 128, dtype=dtype)
    norms, pages = HeadNorms(weight[:128], weight[:128], rule), PageSlots.beside(merged, 8, 128)
    rows.rotate_and_write(merged, (angles, angles), norms, pages, num_heads=32)
    rows.rotate_and_write(merged, None, None, pages, num_heads=32)
    TritonLinear(torch.zeros(64, 128, dtype=dtype), weight[:64])(torch.zeros(3, 128, dtype=dtype))


def _launch_sampler() -> None:
    from engine.triton_sampling import TritonLogitEditor, TritonSampler
    from tests.fakes.sampling_batches import random_batch

    logits, rows, floats = torch.zeros(8, 151_936), torch.zeros(5, dtype=torch.int64), torch.zeros(5)
    for dtype in (torch.float32, torch.bfloat16):
        TritonSampler().settle(logits.to(dtype), TritonSampler().sample(logits.to(dtype), random_batch(8, seed=0)))
    TritonSampler().mask(logits, rows, torch.zeros(5, 4748, dtype=torch.int32))
    nothing, no_floats = rows[:0], floats[:0]
    edits = [nothing, nothing, no_floats, rows, floats, floats, floats, rows, rows, floats, nothing, nothing]
    TritonLogitEditor(*edits).apply(logits)


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
    too_large = [kernel for kernel in compiled if kernel.shared_bytes > SHARED_BYTES[capability]]
    if too_large:
        raise SystemExit(f"too much shared memory: {[(kernel.name, kernel.shared_bytes) for kernel in too_large]}")
    spilling = [kernel for kernel in compiled if kernel.stack_bytes > _MAX_STACK_BYTES]
    if spilling:
        raise SystemExit(f"too few registers: {[(kernel.name, kernel.stack_bytes) for kernel in spilling]}")
    needed = _NEEDED | (_NEEDED_ON_HOPPER if capability == 90 else {})
    lacking = [
        name for name, words in needed.items() if not any(words in kernel.assembly for kernel in _of(compiled, name))
    ]
    if lacking:
        raise SystemExit(f"without what makes them fast: {[(name, needed[name]) for name in lacking]}")
    early_ones = [kernel for kernel in compiled if kernel.is_early]
    if bool(early_ones) != (capability >= 90):
        raise SystemExit(f"{len(early_ones)} kernels are launched early")
    late = {kernel.name for kernel in early_ones if not kernel.awaits_first}
    if late:
        raise SystemExit(f"launched early, they read or write before what is before them has ended: {sorted(late)}")
    exchanging = {kernel.name for kernel in compiled if kernel.name in _WITHOUT_EXCHANGE and kernel.shared_bytes}
    if exchanging:
        raise SystemExit(f"threads exchange what each could load: {sorted(exchanging)}")
    if capability == 90:
        halves = [kernel for kernel in _of(compiled, "decode_kernel") if "mma.sync" in kernel.assembly]
        if not halves or min(kernel.num_at_once(capability) for kernel in halves) < _DECODES_AT_ONCE:
            raise SystemExit("too few decodes fit a multiprocessor")


def _of(compiled: list[CompiledKernel], name: str) -> list[CompiledKernel]:
    return [kernel for kernel in compiled if kernel.name == name]


if __name__ == "__main__":
    main()
