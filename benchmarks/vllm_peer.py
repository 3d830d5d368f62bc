"""vLLM as a contender, on a GPU or its CPU build; see peer_process.py.

It is driven step by step, as its own `LLM.generate` does, so that each token is seen when it comes; over a run of 64
prompts and 15 s that takes 0.03 s of CPU more. It computes in the dtype it is given, its own for the weights if none,
and keeps keys and values in it. On a CPU it has the model compiled by inductor, and says all the same that inductor was
disabled.
"""

import os
import sys
import time
from ctypes.util import find_library
from pathlib import Path

import torch
from peer_process import Measurement, Run, Stopwatch, serve
from vllm import LLM, SamplingParams
from vllm.sampling_params import RequestOutputKind

CPU_KV_CACHE_BYTES = 2 << 30  # as OpenVINO's; its default is nearly all memory, which must be free when it starts


def load(model_dir: str, dtype: str = "auto") -> Run:
    memory = {} if torch.cuda.is_available() else _prepare_cpu()
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


def _prepare_cpu() -> dict[str, int]:
    """What its documentation advises for a CPU, for the processes that it starts; its options.

    The two libraries made runs of 8 prompts 1.2 times as fast on two Zen 4 cores; its extra for AMD, zentorch, none.
    """
    os.environ["VLLM_CPU_NUM_OF_RESERVED_CPU"] = "0"  # it would leave one of two cores idle
    openmp = Path(sys.prefix, "lib", "libiomp5.so")  # among its requirements on x86
    found = [find_library("tcmalloc_minimal"), str(openmp) if openmp.exists() else None]
    os.environ["LD_PRELOAD"] = ":".join(library for library in found if library)
    return {"kv_cache_memory_bytes": CPU_KV_CACHE_BYTES}


if __name__ == "__main__":
    serve(load, *sys.argv[1:])
