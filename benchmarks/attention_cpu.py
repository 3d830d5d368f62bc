"""What does attention over pages cost on this CPU: our C kernel, our torch twin, and SDPA over gathered pages?

One layer of SmolLM2-135M's shape (9 heads, 3 kv heads of 64), the KV cache larger than the CPU's: as in a step of a
model, where each layer's pages come from memory. The bound is the time that memory takes to hand them over once.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.report import print_and_keep
from engine.attention.base import AttentionBatch, AttentionRules
from engine.attention.native import NativeAttention
from engine.attention.torch_backend import TorchAttention
from engine.model.locate import default_cache_dir

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE = 9, 3, 64, 16
NUM_LAYERS = 4
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = []
    for dtype_name in arguments.dtypes:
        for case, parts in cases().items():
            rows.append(measure(case, dtype_name, parts, arguments.rounds))
    print_and_keep(
        "attention_cpu",
        ["case", "dtype", "native ms", "torch ms", "SDPA ms", "torch / native", "SDPA / native", "GB/s", "GFLOP/s"],
        rows,
        [
            f"medians of {arguments.rounds} rounds over {NUM_LAYERS} layers, the backends in turn, for one layer; "
            f"{torch.get_num_threads()} threads",
            f"copying a tensor on this machine: {copy_bandwidth():.1f} GB/s read",
            "GB/s: keys and values once, by the native kernel's time; GFLOP/s: causal multiply-adds, times two",
        ],
    )


def cases() -> dict[str, list[tuple[int, int]]]:
    """Name to the (query, context) lengths of each sequence of the step."""
    generator = torch.Generator().manual_seed(0)
    contexts = torch.randint(200, 1001, (64,), generator=generator).tolist()
    decodes = [(1, context) for context in contexts]
    return {
        "decode, 64 sequences of 200 to 1,000": decodes,
        "decode, 8 sequences of 200 to 1,000": decodes[:8],
        "decode, 1 sequence of 1,000": [(1, 1000)],
        "prefill, 4 prompts of 256": [(256, 256)] * 4,
        "prefill, 1 prompt of 1,024": [(1024, 1024)],
        "chunk of 256 at 768, beside 63 decodes": [(256, 1024), *decodes[1:]],
    }


def measure(case: str, dtype_name: str, parts: list[tuple[int, int]], rounds: int) -> list[str]:
    dtype = DTYPES[dtype_name]
    batch, num_blocks = build_batch(parts)
    shape = (NUM_LAYERS, 2, num_blocks, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM)
    cache = torch.randn(shape, dtype=torch.float32).to(dtype)
    q = torch.randn(batch.num_tokens, NUM_HEADS, HEAD_DIM).to(dtype)
    k, v = (torch.randn(batch.num_tokens, NUM_KV_HEADS, HEAD_DIM).to(dtype) for _ in range(2))
    native, twin = NativeAttention(default_cache_dir() / "kernels"), TorchAttention()
    rules = AttentionRules(HEAD_DIM**-0.5)
    runs: dict[str, Callable[[Tensor], Tensor]] = {
        "native": lambda layer: native.forward(q, k, v, layer, batch, rules),
        "torch": lambda layer: twin.forward(q, k, v, layer, batch, rules),
        "sdpa": lambda layer: sdpa(q, k, v, layer, batch),
    }
    times = time_in_turn(runs, cache, rounds)
    expected = runs["native"](cache[0]).float()
    for name in ("torch", "sdpa"):
        torch.testing.assert_close(runs[name](cache[0]).float(), expected, atol=2e-2, rtol=2e-2)
    read_bytes = sum(context for _, context in parts) * 2 * NUM_KV_HEADS * HEAD_DIM * dtype.itemsize
    seen = sum(query * (2 * context - query + 1) // 2 for query, context in parts)
    return [
        case,
        dtype_name,
        *(f"{times[name] * 1e3:.2f}" for name in runs),
        *(f"{times[name] / times['native']:.1f}" for name in ("torch", "sdpa")),
        f"{read_bytes / times['native'] / 1e9:.1f}",
        f"{4 * seen * NUM_HEADS * HEAD_DIM / times['native'] / 1e9:.0f}",
    ]


def time_in_turn(runs: dict[str, Callable[[Tensor], Tensor]], cache: Tensor, rounds: int) -> dict[str, float]:
    """Median seconds of one layer for each run."""
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            for layer in cache:
                run(layer)
            if i > 0:
                samples[name].append((time.perf_counter() - start) / len(cache))
    return {name: statistics.median(values) for name, values in samples.items()}


def build_batch(parts: list[tuple[int, int]]) -> tuple[AttentionBatch, int]:
    """The step and how many blocks its cache has; each sequence's blocks are scattered."""
    counts = [-(-context // BLOCK_SIZE) for _, context in parts]
    order = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(1)).split(counts)  # type: ignore[no-untyped-call]
    slots = []
    for (query, context), blocks in zip(parts, order, strict=True):
        positions = torch.arange(context - query, context)
        slots.append(blocks[positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE)
    queries = [query for query, _ in parts]
    contexts = [context for _, context in parts]
    batch = AttentionBatch(
        query_start=torch.tensor([0, *queries]).cumsum(0).to(torch.int32),
        context_lens=torch.tensor(contexts, dtype=torch.int32),
        block_tables=torch.nn.utils.rnn.pad_sequence(list(order), batch_first=True).to(torch.int32),
        slot_mapping=torch.cat(slots),
        num_seqs=len(parts),
        num_tokens=sum(queries),
        max_query_len=max(queries),
        max_context_len=max(contexts),
    )
    return batch, sum(counts)


def sdpa(q: Tensor, k: Tensor, v: Tensor, layer: Tensor, batch: AttentionBatch) -> Tensor:
    """The usual way without a paged kernel: gather each sequence's pages, then torch's own attention."""
    keys, values = layer.flatten(1, 2).unbind(0)
    keys[batch.slot_mapping] = k
    values[batch.slot_mapping] = v
    starts, contexts = batch.query_start.tolist(), batch.context_lens.tolist()
    outputs = []
    for i in range(batch.num_seqs):
        positions = torch.arange(contexts[i])
        slots = batch.block_tables[i][positions // BLOCK_SIZE].long() * BLOCK_SIZE + positions % BLOCK_SIZE
        query = q[starts[i] : starts[i + 1]].transpose(0, 1)[None]
        offset = contexts[i] - query.shape[2]
        mask = None if query.shape[2] == 1 else positions <= torch.arange(query.shape[2])[:, None] + offset
        output = torch.nn.functional.scaled_dot_product_attention(
            query,
            keys[slots].transpose(0, 1)[None],
            values[slots].transpose(0, 1)[None],
            attn_mask=mask,
            enable_gqa=True,
        )
        outputs.append(output[0].transpose(0, 1))
    return torch.cat(outputs)


def copy_bandwidth() -> float:
    """GB/s at which a tensor far larger than the caches is read."""
    source = torch.ones(1 << 27)
    source.sum()
    samples = []
    for _ in range(5):
        start = time.perf_counter()
        source.sum()
        samples.append(time.perf_counter() - start)
    return source.nbytes / statistics.median(samples) / 1e9


if __name__ == "__main__":
    main()
