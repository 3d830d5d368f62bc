"""transformers' own continuous batching as a contender; see peer_process.py and transformers_peer.py."""

import sys

import torch
from peer_process import Measurement, Run, serve
from transformers import AutoModelForCausalLM

from benchmarks.transformers_peer import run as run_workload


def load(model_dir: str, dtype: str, device: str = "cpu") -> Run:
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=getattr(torch, dtype), local_files_only=True)
    model = model.to(device).eval()

    def run(prompts: list[list[int]], max_tokens: list[int]) -> Measurement:
        num_blocks = (sum(map(len, prompts)) + sum(max_tokens)) // 16 + 2 * len(prompts)
        is_cpu = device == "cpu"
        reply = run_workload(model, {"prompts": prompts, "max_tokens": max_tokens}, num_blocks if is_cpu else None)
        return {"seconds": reply["seconds"], "counts": [reply["num_tokens"]]}

    return run


if __name__ == "__main__":
    serve(load, *sys.argv[1:])
