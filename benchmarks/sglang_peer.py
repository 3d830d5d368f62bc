"""SGLang as a contender on a GPU; see peer_process.py."""

import sys
import time

import sglang
from peer_process import Measurement, Run, serve


def load(model_dir: str) -> Run:
    engine = sglang.Engine(model_path=model_dir, skip_tokenizer_init=True, disable_radix_cache=True)

    def run(prompts: list[list[int]], max_tokens: list[int]) -> Measurement:
        params = [{"max_new_tokens": limit, "temperature": 0.0, "ignore_eos": True} for limit in max_tokens]
        start = time.perf_counter()
        outputs = engine.generate(input_ids=prompts, sampling_params=params)
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "counts": [output["meta_info"]["completion_tokens"] for output in outputs]}

    return run


if __name__ == "__main__":
    serve(load, *sys.argv[1:])
