"""vLLM as a contender, on a GPU or its CPU build; it does not tell when a token came. See peer_process.py."""

import os
import sys
import time

import torch
from peer_process import Measurement, Run, serve
from vllm import LLM, SamplingParams

CPU_MEMORY_SHARE = 0.3  # of all memory, which must be free when it starts; its default is nearly all


def load(model_dir: str, dtype: str = "auto") -> Run:
    os.environ["VLLM_CPU_NUM_OF_RESERVED_CPU"] = "0"  # it would leave one of two cores idle
    memory = {} if torch.cuda.is_available() else {"gpu_memory_utilization": CPU_MEMORY_SHARE}
    model = LLM(model_dir, dtype=dtype, enable_prefix_caching=False, max_model_len=2048, **memory)

    def run(prompts: list[list[int]], max_tokens: list[int]) -> Measurement:
        params = [SamplingParams(max_tokens=limit, temperature=0.0, ignore_eos=True) for limit in max_tokens]
        start = time.perf_counter()
        outputs = model.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "counts": [len(output.outputs[0].token_ids) for output in outputs]}

    return run


if __name__ == "__main__":
    serve(load, *sys.argv[1:])
