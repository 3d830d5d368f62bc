"""llama.cpp through llama-cpp-python on the demo model's GGUF as a contender, one prompt after the other: the binding
has no batching. See peer_process.py."""

import sys
import time

import llama_cpp
from peer_process import Measurement, Run, Stopwatch, serve


def load(model_path: str) -> Run:
    model = llama_cpp.Llama(model_path, n_ctx=2048, verbose=False)

    def run(prompts: list[list[int]], max_tokens: list[int]) -> Measurement:
        watch = Stopwatch(len(prompts), time.perf_counter)
        for i, (prompt, limit) in enumerate(zip(prompts, max_tokens, strict=True)):
            model.reset()
            for count, _ in enumerate(model.generate(prompt, temp=0.0), 1):
                watch.took(i, 1)
                if count == limit:
                    break
        return watch.measurement()

    return run


if __name__ == "__main__":
    serve(load, *sys.argv[1:])
