"""llama.cpp on the demo model's GGUF as a contender; see peer_process.py.

llama-cpp-python's `Llama` serves one prompt after the other, on half of the cores. So this is the loop of llama.cpp's
server, on the binding of its C interface: a step is one token of every sequence that decodes, and what its batch still
holds of the prompts, in order. The file's 4-bit weights are multiplied in 8 bits, keys and values are kept in float16.
"""

import os
import sys
import time

import llama_cpp
import numpy as np
from peer_process import Measurement, Run, Stopwatch, serve

MAX_BATCH_TOKENS = 2048  # the server's default


class Sequences:
    """All prompts of a workload in one context, in which each has its own share of keys and values."""

    def __init__(self, model: llama_cpp.llama_model_p, prompts: list[list[int]], max_tokens: list[int]) -> None:
        self._unread = [prompt[:] for prompt in prompts]  # what the next steps feed, of each sequence
        self._positions = [0] * len(prompts)
        self._left = max_tokens[:]
        params = llama_cpp.llama_context_default_params()
        longest = max(len(prompt) + limit for prompt, limit in zip(prompts, max_tokens, strict=True))
        params.n_ctx, params.n_seq_max, params.n_batch = longest * len(prompts), len(prompts), MAX_BATCH_TOKENS
        params.n_threads = params.n_threads_batch = len(os.sched_getaffinity(0))
        self._context = llama_cpp.llama_init_from_model(model, params)
        self._num_ids = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        self._batch = llama_cpp.llama_batch_init(MAX_BATCH_TOKENS, 0, 1)

    def close(self) -> None:
        llama_cpp.llama_batch_free(self._batch)
        llama_cpp.llama_free(self._context)

    def step(self) -> list[int]:
        """The sequences that got a token; none: all are done."""
        self._batch.n_tokens = 0
        decodes_first = sorted((i for i, ids in enumerate(self._unread) if ids), key=lambda i: len(self._unread[i]) > 1)
        sampled = [i for i in decodes_first if self._feed(i)]
        if not self._batch.n_tokens:
            return []
        if llama_cpp.llama_decode(self._context, self._batch) != 0:
            raise RuntimeError("llama_decode failed")
        if sampled:
            logits = llama_cpp.llama_get_logits(self._context)
            rows = np.ctypeslib.as_array(logits, (len(sampled), self._num_ids))
            for i, token in zip(sampled, rows.argmax(axis=1).tolist(), strict=True):
                self._left[i] -= 1
                self._unread[i] = [token] if self._left[i] else []
        return sampled

    def _feed(self, i: int) -> bool:
        """Put what the batch has room for of the sequence's unread tokens into it; whether that is all of them."""
        batch, ids = self._batch, self._unread[i]
        fed = ids[: MAX_BATCH_TOKENS - batch.n_tokens]
        is_all = len(fed) == len(ids)
        for token in fed:
            at = batch.n_tokens
            batch.token[at], batch.pos[at], batch.logits[at] = token, self._positions[i], False
            batch.n_seq_id[at], batch.seq_id[at][0] = 1, i
            batch.n_tokens += 1
            self._positions[i] += 1
        if is_all:
            batch.logits[batch.n_tokens - 1] = True
        self._unread[i] = ids[len(fed) :]
        return is_all


def load(model_path: str) -> Run:
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(model_path.encode(), llama_cpp.llama_model_default_params())

    def run(prompts: list[list[int]], max_tokens: list[int]) -> Measurement:
        sequences = Sequences(model, prompts, max_tokens)
        watch = Stopwatch(len(prompts), time.perf_counter)
        while sum(watch.counts) < sum(max_tokens):
            for i in sequences.step():
                watch.took(i, 1)
        measurement = watch.measurement()
        sequences.close()
        return measurement

    return run


if __name__ == "__main__":
    serve(load, *sys.argv[1:])
