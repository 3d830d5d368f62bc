"""transformers' own continuous batching as a contender: a process that runs one workload a line of stdin.

In: `{"prompts": [[id, …]], "max_tokens": [n, …]}`. Out: `{"seconds": s, "num_tokens": n}`; the first line out is `{}`,
once the model is loaded.
"""

import json
import sys
import time
from dataclasses import fields
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation import ContinuousBatchingConfig


def main(model_dir: str, dtype: str, num_blocks: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=getattr(torch, dtype), local_files_only=True).eval()
    reply: dict[str, Any] = {}
    while True:
        print(json.dumps(reply), flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        reply = run(model, json.loads(line), int(num_blocks))


def run(model: Any, workload: dict[str, Any], num_blocks: int | None) -> dict[str, Any]:
    """num_blocks: of its cache; None: its own choice of that and all else, as on a GPU, whose memory it measures."""
    generation = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=1024)
    with model.continuous_batching_context_manager(
        generation_config=generation, continuous_batching_config=_config(num_blocks), block=True, timeout=5
    ) as manager:
        start = time.perf_counter()
        for prompt, max_tokens in zip(workload["prompts"], workload["max_tokens"], strict=True):
            manager.add_request(prompt, max_new_tokens=max_tokens)
        num_tokens, num_finished = 0, 0
        while num_finished < len(workload["prompts"]):
            result = manager.get_result(timeout=1)
            if result is None:
                if not manager.is_running():
                    raise SystemExit("transformers' continuous batching stopped before the workload was done")
            elif result.is_finished():
                num_finished += 1
                num_tokens += len(result.generated_tokens)
        seconds = time.perf_counter() - start
    return {"seconds": seconds, "num_tokens": num_tokens}


def _config(num_blocks: int | None) -> ContinuousBatchingConfig:
    if num_blocks is None:
        return ContinuousBatchingConfig()
    # The page size of 16 is ours; a whole run fits the cache, as it does in ours. Some versions name it otherwise.
    page_size = (
        "page_size" if "page_size" in {field.name for field in fields(ContinuousBatchingConfig)} else "block_size"
    )
    return ContinuousBatchingConfig(**{page_size: 16}, num_blocks=num_blocks, max_batch_tokens=1024)


if __name__ == "__main__":
    main(*sys.argv[1:])
