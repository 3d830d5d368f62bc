"""transformers' own continuous batching as a contender; see peer_process.py.

It computes in the dtype it is given, attention through torch's scaled dot product over gathered pages unless a flash
attention is installed. On a CPU it needs psutil, to know how much memory there is.
"""

import sys
import time
from dataclasses import fields
from typing import Any

import torch
from peer_process import Measurement, Run, Stopwatch, serve
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation import ContinuousBatchingConfig


def load(model_dir: str, dtype: str, device: str = "cpu") -> Run:
    model: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=getattr(torch, dtype), local_files_only=True)
    model = model.to(device).eval()
    generation = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=1024)

    def run(prompts: list[list[int]], max_tokens: list[int]) -> Measurement:
        # On a GPU, whose memory it measures, everything is its own choice.
        config = ContinuousBatchingConfig() if device != "cpu" else _cpu_config(prompts, max_tokens)
        with model.continuous_batching_context_manager(
            generation_config=generation, continuous_batching_config=config, block=True, timeout=5
        ) as manager:
            watch = Stopwatch(len(prompts), time.perf_counter)
            for i, (prompt, limit) in enumerate(zip(prompts, max_tokens, strict=True)):
                manager.add_request(prompt, request_id=str(i), max_new_tokens=limit, streaming=True)
            while sum(watch.counts) < sum(max_tokens):
                result = manager.get_result(timeout=1)
                if result is not None:
                    i = int(result.request_id)
                    watch.took(i, len(result.generated_tokens) - watch.counts[i])
                if not manager.is_running() or (result is not None and result.error is not None):
                    raise SystemExit("transformers' continuous batching stopped before the workload was done")
            return watch.measurement()

    return run


def _cpu_config(prompts: list[list[int]], max_tokens: list[int]) -> ContinuousBatchingConfig:
    """Pages as large as ours, 16 tokens, by the name that the version has for it; a whole run fits the cache.

    Left to choose for itself on a CPU, it took more than seven minutes over two short prompts.
    """
    names = {field.name for field in fields(ContinuousBatchingConfig)}
    num_blocks = (sum(map(len, prompts)) + sum(max_tokens)) // 16 + 2 * len(prompts)
    page_size = {"page_size" if "page_size" in names else "block_size": 16}
    return ContinuousBatchingConfig(**page_size, num_blocks=num_blocks, max_batch_tokens=1024)


if __name__ == "__main__":
    serve(load, *sys.argv[1:])
