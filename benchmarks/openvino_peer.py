"""OpenVINO GenAI's continuous batching on the demo model's GGUF as a contender; see peer_process.py.

All but the cache is its own choice: float32, or bfloat16 on a CPU that multiplies it; products with the file's 4-bit
weights in 8 bits (rows quantised in groups of 32), keys and values in 8 bits; steps of 256 tokens.
"""

import sys
import time

import numpy as np
import openvino
import openvino_genai
from peer_process import Measurement, Run, Stopwatch, serve


def load(model_path: str) -> Run:
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.cache_size = 2  # GiB
    scheduler.enable_prefix_caching = False  # no prompt comes twice
    pipeline = openvino_genai.ContinuousBatchingPipeline(model_path, scheduler, "CPU")

    def run(prompts: list[list[int]], max_tokens: list[int]) -> Measurement:
        watch = Stopwatch(len(prompts), time.perf_counter)
        handles = []
        for i, (prompt, limit) in enumerate(zip(prompts, max_tokens, strict=True)):
            config = openvino_genai.GenerationConfig(max_new_tokens=limit, ignore_eos=True, do_sample=False)
            handles.append(pipeline.add_request(i, openvino.Tensor(np.array([prompt], np.int64)), config))
        while pipeline.has_non_finished_requests():
            pipeline.step()
            for i, handle in enumerate(handles):
                if handle.can_read():
                    watch.took(i, sum(len(output.generated_ids) for output in handle.read().values()))
        return watch.measurement()

    return run


if __name__ == "__main__":
    serve(load, *sys.argv[1:])
