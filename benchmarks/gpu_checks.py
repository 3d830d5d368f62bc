"""Whether the GPU's kernels compute what their twins do: fresh random inputs, poisoned outputs and pages.

Then the whole engine against transformers on the same weights, and rows bit for bit in other batches.
"""

import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from benchmarks.gpu_models import ModelSize
from engine.attention.base import AttentionRules, PageSlots
from engine.attention.triton_backend import TritonAttention
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.messages import AddSequence
from engine.model.loader import load_model
from engine.model.norm_rule import NormRule
from engine.model.triton_linear import TritonLinear
from engine.model.triton_rows import TritonRows
from engine.sampler import Sampler
from engine.sampling_params import SamplingParams
from engine.triton_sampling import TritonSampler
from tests.fakes.core_driver import run_to_end
from tests.fakes.kernel_device import OnKernelDevice, poisoned_memory
from tests.fakes.packed_forward import BLOCK_SIZE, Part, run
from tests.fakes.paged_batches import PagedWorld, dense_attention
from tests.fakes.sampling_batches import random_batch

# Roundings of weights, activations and outputs in 16 bits, at values of a few units.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 6e-2, torch.float16: 8e-3}


def check_kernels(
    size: ModelSize, device: torch.device, seed: int, dtypes: Sequence[torch.dtype]
) -> Iterator[tuple[str, str]]:
    """What came of each kernel's check: `ok`, or what differs, or what it raised."""
    checks: dict[str, Callable[[], str]] = {
        f"{name} {str(dtype).removeprefix('torch.')}": partial(check, size, device, dtype, seed)
        for dtype in dtypes
        for name, check in (("attention", _attention), ("rows", _rows), ("linear", _linear))
    }
    checks["sampler"] = lambda: _sampler(size, device, seed)
    for name, check in checks.items():
        try:
            with torch.inference_mode(), poisoned_memory():
                result = check()
        except Exception as error:  # a compiler's, say: the other kernels are checked all the same
            result = f"{type(error).__name__}: {str(error).strip()[:200]}"
        yield name, result


def _close(output: Tensor, expected: Tensor, dtype: torch.dtype) -> str:
    difference = float((output.double().cpu() - expected.double().cpu()).abs().max())
    return "ok" if difference <= _TOLERANCE[dtype] else f"differs by {difference}"


def _attention(size: ModelSize, device: torch.device, dtype: torch.dtype, seed: int) -> str:
    """A chunked prefill, a mixed step and decodes, all rules on, over pages full of NaN."""
    rng = random.Random(seed)
    longest = 1500 if device.type == "cuda" else 40
    world = PagedWorld.build(
        [1, 17, rng.randint(20, longest), longest],
        num_heads=size.heads,
        num_kv_heads=size.kv_heads,
        head_dim=size.head_dim,
        dtype=dtype,
        seed=seed,
    )
    rules = AttentionRules(size.head_dim**-0.5, longest // 2, softcap=20.0, sinks=torch.linspace(-1, 3, size.heads))
    cut = rng.randint(1, 15)
    lengths = [len(sequence.q) for sequence in world.sequences]
    steps = [
        [(1, 0, 16), (3, 0, longest - cut)],
        [(1, 16, 17), (0, 0, 1), (3, longest - cut, longest - 1), (2, 0, lengths[2] - 1)],
        [(2, lengths[2] - 1, lengths[2]), (3, longest - 1, longest)],
    ]
    outputs = world.run(OnKernelDevice(TritonAttention()), steps, rules)
    expected = [dense_attention(sequence, rules) for sequence in world.sequences]
    return _close(torch.cat(outputs), torch.cat(expected), dtype)


def _rows(size: ModelSize, device: torch.device, dtype: torch.dtype, seed: int) -> str:
    """Addition with norm, gated activation, rotation, against transformers' own."""
    generator, rows = torch.Generator().manual_seed(seed), TritonRows()

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    norm = LlamaRMSNorm(size.hidden, eps=1e-6).to(device, dtype)
    x, residual = draw(5, size.hidden), draw(5, size.hidden)
    total, normed = rows.add_norm(x, residual, norm.weight.detach(), NormRule(1e-6, False, True))
    gate_up = draw(5, 2 * size.intermediate)
    gate, up = gate_up.chunk(2, dim=1)
    q_heads, kv_heads, dim = size.heads, size.kv_heads, size.head_dim
    merged = draw(5, (q_heads + 2 * kv_heads) * dim)
    angles = draw(5, dim // 2).repeat(1, 2)
    pages = PageSlots.beside(merged, kv_heads, dim)
    q = rows.rotate_and_write(merged, (angles.cos(), angles.sin()), None, pages, num_heads=q_heads)
    heads = merged.view(5, -1, dim).transpose(0, 1)[None]  # [1, heads, 5, dim]
    turned = apply_rotary_pos_emb(
        heads[:, :q_heads], heads[:, q_heads : q_heads + kv_heads], angles.cos()[None], angles.sin()[None]
    )
    pairs = [
        (normed, norm(total)),
        (total, x + residual),
        (rows.glu(gate_up, is_gelu=False), torch.nn.functional.silu(gate) * up),
        (q, turned[0][0].transpose(0, 1)),
        (pages.keys, turned[1][0].transpose(0, 1)),
        (pages.values, merged.view(5, -1, dim)[:, q_heads + kv_heads :]),
    ]
    return next((result for pair in pairs if (result := _close(*pair, dtype)) != "ok"), "ok")


def _linear(size: ModelSize, device: torch.device, dtype: torch.dtype, seed: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(size.intermediate, size.hidden, generator=generator) * size.hidden**-0.5).to(device, dtype)
    x = torch.randn(150, size.hidden, generator=generator).to(device, dtype)
    layer = TritonLinear(weight, None)
    output = layer(x)
    if not all(torch.equal(layer(x[-n:]), output[-n:]) for n in (1, 3, 130)):
        return "a row depends on its batch"
    return _close(output, x.double() @ weight.double().t(), dtype)


def _sampler(size: ModelSize, device: torch.device, seed: int) -> str:
    num_rows = 64 if device.type == "cuda" else 8
    batch = random_batch(num_rows, seed=seed)
    moved = batch.to(device)
    for scale in (3, 0.1):  # of rows as flat as the latter thresholds are sought among all tokens
        logits = torch.randn(num_rows, size.vocab, generator=torch.Generator().manual_seed(seed)) * scale
        for dtype in (torch.float32, torch.bfloat16):
            expected = Sampler().sample(logits.to(dtype).float(), batch)
            num_others = int((TritonSampler().sample(logits.to(device, dtype), moved).cpu() != expected).sum())
            if num_others:
                return f"{num_others} of {num_rows} tokens differ in {dtype} at a scale of {scale}"
    return "ok"


def check_tests() -> str:
    """`ok`, or what pytest says last of the tests that are for a GPU. They need nothing that only a worker needs."""
    command = [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "--rootdir", ".", "--noconftest", "-p"]
    command += ["no:cacheprovider", "--import-mode=importlib", "tests/gpu"]
    root = Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run(command, cwd=root, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    print(done.stdout, file=sys.stderr, flush=True)
    return "ok" if done.returncode == 0 else " ".join(done.stdout.splitlines()[-1:]) or "pytest is not installed"


def check_engine(size: ModelSize, folder: Path, device: torch.device, *, num_tokens: int) -> Iterator[tuple[str, str]]:
    """Logits against transformers' on the same weights, greedy tokens in float32, rows in other batches."""
    generator = torch.Generator().manual_seed(1)
    sequences = [torch.randint(0, size.vocab, (n,), generator=generator) for n in (1, num_tokens // 3, num_tokens)]
    whole = [(i, 0, len(tokens)) for i, tokens in enumerate(sequences)]
    for dtype in ("bfloat16", "float32"):
        twin = AutoModelForCausalLM.from_pretrained(str(folder), dtype=getattr(torch, dtype)).to(device).eval()
        with torch.inference_mode():
            expected = [twin(tokens[None].to(device)).logits[0].float().cpu() for tokens in sequences]
        outputs = run(load_model(_config(folder, device, dtype)), sequences, [whole])
        scale = max(float(logits.abs().max()) for logits in expected)
        difference = max(float((a - b).abs().max()) for a, b in zip(outputs, expected, strict=True)) / scale
        # Relative to the largest logit: bfloat16 rounds to 2^-9 at every one of a layer's stages.
        limit = 5e-2 if dtype == "bfloat16" else 1e-3
        yield f"logits {dtype}", "ok" if difference <= limit else f"differ by {difference} of the largest"
        if dtype == "float32":
            yield "greedy tokens float32", _greedy(folder, device, twin, sequences[1:])
        del twin
    yield "rows bit for bit, deterministic", _invariance(folder, device, sequences, whole)


def _config(folder: Path, device: torch.device, dtype: str, **options: object) -> EngineConfig:
    fields: dict[str, object] = {
        "model_path": str(folder),
        "device": str(device),
        "dtype": dtype,
        "block_size": BLOCK_SIZE,
    }
    return EngineConfig(**fields | {"attention": "triton", "num_kv_blocks": 512} | options)  # type: ignore[arg-type]


def _greedy(folder: Path, device: torch.device, twin: torch.nn.Module, prompts: list[Tensor]) -> str:
    num_new = 16 if device.type == "cuda" else 3
    core = EngineCore(_config(folder, device, "float32", max_num_seqs=4, max_num_tokens=64))
    params = SamplingParams(max_tokens=num_new, temperature=0.0, ignore_eos=True)
    for i, prompt in enumerate(prompts):
        core.add(AddSequence(sequence_id=i, prompt_token_ids=prompt.tolist(), params=params))
    outputs = run_to_end(core, len(prompts))
    twin.generation_config.eos_token_id = None  # type: ignore[union-attr]
    for prompt, output in zip(prompts, outputs, strict=True):
        ids = prompt[None].to(device)
        mask = torch.ones_like(ids)
        tokens = twin.generate(ids, attention_mask=mask, max_new_tokens=num_new, do_sample=False, pad_token_id=0)  # type: ignore[operator]
        if tokens[0, len(prompt) :].tolist() != output:
            return "other tokens than transformers'"
    return "ok"


def _invariance(folder: Path, device: torch.device, sequences: list[Tensor], whole: list[Part]) -> str:
    model = load_model(_config(folder, device, "bfloat16", deterministic=True))
    together = run(model, sequences, [whole])
    last, cut = len(sequences) - 1, len(sequences[-1]) // 2
    alone = run(model, sequences, [[part] for part in whole])
    chunks: list[list[Part]] = [[*whole[:-1], (last, 0, cut)], [(last, cut, len(sequences[-1]) - 1)]]
    chunks.append([(last, len(sequences[-1]) - 1, len(sequences[-1]))])
    chunked = run(model, sequences, chunks)
    for name, outputs in (("alone", alone), ("in chunks", chunked)):
        if not all(torch.equal(a, b) for a, b in zip(outputs, together, strict=True)):
            return f"other bits {name}"
    return "ok"
