"""vLLM as a contender, on a GPU or its CPU build; see peer_process.py.

It is driven step by step, as its own `LLM.generate` does, so that each token is seen when it comes.
"""

import os
import sys
import time

import torch
from peer_process import Measurement, Run, Stopwatch, serve
from vllm import LLM, SamplingParams
from vllm.sampling_params import RequestOutputKind

CPU_KV_CACHE_BYTES = 2 << 30  # as OpenVINO's; its default is nearly all memory, which must be free when it starts


def load(model_dir: str, dtype: str = "auto") -> Run:
    os.environ["VLLM_CPU_NUM_OF_RESERVED_CPU"] = "0"  # it would leave one of two cores idle
    memory = {} if torch.cuda.is_available() else {"kv_cache_memory_bytes": CPU_KV_CACHE_BYTES}
    engine = LLM(model_dir, dtype=dtype, enable_prefix_caching=False, max_model_len=2048, **memory).llm_engine

    def run(prompts: list[list[int]], max_tokens: list[int]) -> Measurement:
        watch = Stopwatch(len(prompts), time.perf_counter)
        for i, (prompt, limit) in enumerate(zip(prompts, max_tokens, strict=True)):
            params = SamplingParams(max_tokens=limit, temperature=0.0, ignore_eos=True)
            params.output_kind = RequestOutputKind.DELTA
            engine.add_request(str(i), {"prompt_token_ids": prompt}, params)
        while engine.has_unfinished_requests():
            for output in engine.step():
                watch.took(int(output.request_id), len(output.outputs[0].token_ids))
        return watch.measurement()

    return run


if __name__ == "__main__":
    serve(load, *sys.argv[1:])
