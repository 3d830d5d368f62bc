"""vLLM's CPU build as a contender; it tells when a token came only where its metrics do. See peer_process.py."""

import sys
import time

from peer_process import Measurement, serve
from vllm import LLM, SamplingParams


def main(model_dir: str) -> None:
    model = LLM(model_dir, enable_prefix_caching=False, max_model_len=2048)

    def run(prompts: list[list[int]], max_tokens: list[int]) -> Measurement:
        params = [SamplingParams(max_tokens=limit, temperature=0.0, ignore_eos=True) for limit in max_tokens]
        start = time.perf_counter()
        outputs = model.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "counts": [len(output.outputs[0].token_ids) for output in outputs]}

    serve(run)


if __name__ == "__main__":
    main(*sys.argv[1:])
