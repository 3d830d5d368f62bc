"""The engine as its users meet it: prompts in, text out. Runs the model in a child process and never imports torch.

Owns the checks of what comes in and the library's ways of waiting for what goes out; `engine.supervisor` does the work.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import suppress
from typing import Any
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from engine.arguments import check_placing, read_config, read_one_choice, read_params, read_params_for_each
from engine.collector import Collector, EmbeddingCollector
from engine.config import EngineConfig
from engine.errors import InvalidRequestError
from engine.finish_rule import FinishRule
from engine.lifecycle import EngineLifecycle
from engine.outputs import GenerationOutput, OnOutput, RequestOutput, raise_for_error
from engine.process import Child, ChildProcess
from engine.prompt_reader import Prompt, PromptReader, is_text
from engine.request import Request
from engine.sampling_params import SamplingParams

_NO_TOKENS = SamplingParams(max_tokens=0)  # of what is only embedded
_NEVER = FinishRule(max_total_tokens=0, stop_token_ids=())  # asked: it samples none


class InferenceEngine(EngineLifecycle):
    """Continuous batching of prompts on one device. Thread-safe, for any number of threads and event loops.

    A prompt is text or a list of token ids. Everything that takes one raises `InvalidRequestError`
    (`ContextLengthError`) naming the field before anything is sent, and `EngineNotRunningError` before `start()` and
    after `stop()`.
    """

    def __init__(
        self,
        model_path: str | None = None,
        max_num_seqs: int = 256,
        max_num_tokens: int | None = None,
        device: str = "auto",
        dtype: str = "auto",
        *,
        config: EngineConfig | None = None,
        _start_child: Callable[[EngineConfig], Child] = ChildProcess,
        **fields: Any,
    ) -> None:
        """Takes the fields of `EngineConfig`, or `config` alone. Raises `InvalidRequestError` naming the field."""
        given = model_path, max_num_seqs, max_num_tokens, device, dtype
        if config is None:
            names = ("model_path", "max_num_seqs", "max_num_tokens", "device", "dtype")
            config = read_config(fields | dict(zip(names, given, strict=True)))
        elif fields or given != (None, 256, None, "auto", "auto"):
            raise InvalidRequestError("give config alone or its fields, not both", param="config")
        super().__init__(config, _start_child)

    def submit(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        deadline: float | None = None,
        output_token_ids: Sequence[Sequence[int]] = (),
        cache_key: str = "",
        on_output: OnOutput,
    ) -> None:
        """Starts a request and returns; `on_output` is called from the engine's thread, in order, until `finished`.

        Callbacks must be quick and must not wait for the engine; one that raises ends its request. An id may be used
        again once its request has finished.

        Lower `priority` runs first; among equals the earlier `deadline` (epoch seconds), which orders and ends nothing.

        `output_token_ids` resumes a request: for each choice the tokens it already has. They count towards
        `max_tokens`, and the next token is what the uninterrupted request would have got. Each such choice is replayed
        in one output with `is_replay` before any new token; tokens after its end (a stop, `max_tokens`) are left out
        of it, so a caller who stored them can see that they were not this request's.

        Requests share the KV blocks of equal prefixes only under equal `cache_key`s. Give each party its own if it must
        not learn from response times what another has asked.
        """
        supervisor, reader = self._running()
        prompt, params = reader.check(prompt_token_ids), read_params(params)
        check_placing(priority, deadline, cache_key)
        info = reader.info
        reader.check_params(params)
        supervisor.submit(
            Request(
                request_id,
                [prompt] * params.n,
                params,
                priority=priority,
                deadline=deadline,
                finish_rule=FinishRule.of(
                    params, len(prompt), max_len=info.max_model_len, eos_token_ids=info.eos_token_ids
                ),
                cache_key=cache_key,
                output_token_ids=reader.check_output(output_token_ids, params.n),
                on_output=on_output,
                token_bytes=reader.tokenizer.token_bytes.showing(params.visible_token_ids),
            )
        )

    def submit_embedding(
        self,
        request_id: str,
        prompts: Sequence[list[int]],
        *,
        dimensions: int | None = None,
        priority: int = 0,
        deadline: float | None = None,
        cache_key: str = "",
        on_output: OnOutput,
    ) -> None:
        """As `submit`, for an embedding of each prompt, token ids: one output each, in any order, `index` its place.

        `dimensions`: leading numbers that are kept, for models trained for it (Matryoshka); None: all of them.
        """
        supervisor, reader = self._running()
        pooling = self.embedding_reader.pooling(dimensions)
        checked = self.embedding_reader.check_all(prompts)
        check_placing(priority, deadline, cache_key)
        if not checked:
            raise InvalidRequestError("prompts holds nothing to embed; give one prompt at least", param="prompts")
        supervisor.submit(
            Request(
                request_id,
                checked,
                _NO_TOKENS,
                pooling=pooling,
                priority=priority,
                deadline=deadline,
                cache_key=cache_key,
                finish_rule=_NEVER,
                on_output=on_output,
                token_bytes=reader.tokenizer.token_bytes,
            )
        )

    def abort(self, request_id: str) -> None:
        """Ends every choice with `cancelled`, delivered like any output. An unknown id is ignored."""
        self._running()[0].abort(request_id)

    def generate(self, prompt: Prompt, params: SamplingParams | None = None) -> str:
        """The answer's text. Raises `EngineDiedError` or another `EngineError` if it ends with an error."""
        (output,) = self._generate_all([self._running()[1].read(prompt)], [read_one_choice(params)])
        raise_for_error(output)
        return output.text

    def generate_batch(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[GenerationOutput]:
        """Every choice of every prompt, ordered by prompt, then by `index`; `params` for all or one for each.

        A request that fails does not raise: its outputs have `finish_reason` "error" and say why.
        """
        token_ids = self._running()[1].read_all(prompts)
        return self._generate_all(token_ids, read_params_for_each(params, len(token_ids)))

    async def generate_async(self, prompt: Prompt, params: SamplingParams | None = None) -> str:
        """`generate` for an event loop; tokenises on another thread. Cancelling it aborts the request."""
        reader, params = self._running()[1], read_one_choice(params)
        request_id, collector = self._collect(await asyncio.to_thread(reader.read, prompt), params)
        try:
            (output,) = await asyncio.wrap_future(collector.future)
        except asyncio.CancelledError:
            self._abort_if_running(request_id)
            raise
        raise_for_error(output)
        return output.text

    def generate_stream(self, prompt: Prompt, params: SamplingParams | None = None) -> AsyncGenerator[str, None]:
        """The answer's text in pieces, as it comes; closing or cancelling the generator aborts the request.

        Text is tokenised on another thread once the first piece is asked for, so an invalid text raises then; any other
        invalid argument raises here.
        """
        reader, params = self._running()[1], read_one_choice(params)
        return self._stream(reader, prompt if is_text(prompt) else reader.check(prompt), params)

    async def _stream(
        self, reader: PromptReader, prompt: str | list[int], params: SamplingParams
    ) -> AsyncGenerator[str, None]:
        token_ids = await asyncio.to_thread(reader.read, prompt) if isinstance(prompt, str) else prompt
        loop = asyncio.get_running_loop()
        outputs: asyncio.Queue[RequestOutput] = asyncio.Queue()
        request_id = uuid4().hex

        def on_output(output: RequestOutput) -> None:
            with suppress(RuntimeError):  # the loop has been closed: nobody listens any more
                loop.call_soon_threadsafe(outputs.put_nowait, output)

        self.submit(request_id, token_ids, params, on_output=on_output)
        try:
            while True:
                output = await outputs.get()
                if output.text:
                    yield output.text
                if output.finished:
                    break
        except BaseException:
            self._abort_if_running(request_id)
            raise
        raise_for_error(output)

    def embed(self, prompts: Sequence[Prompt], dimensions: int | None = None) -> NDArray[np.float32]:
        """The embedding of each prompt, `[num_prompts, dimensions]`, as the model's folder says: by default the last
        token's hidden state, of length one. Bit-identical whatever else runs, wherever outputs are.

        `dimensions`: leading numbers that are kept, for models trained for it (Matryoshka); None: all of them. Raises
        as `generate` does, and `InvalidRequestError` for a model whose kind of pooling is not served.
        """
        request_id, collector = self._collect_embeddings(self.embedding_reader.read_all(prompts), dimensions)
        try:
            return collector.future.result()
        except BaseException:
            self._abort_if_running(request_id)
            raise

    async def embed_async(self, prompts: Sequence[Prompt], dimensions: int | None = None) -> NDArray[np.float32]:
        """`embed` for an event loop; tokenises on another thread. Cancelling it aborts the request."""
        token_ids = await asyncio.to_thread(self.embedding_reader.read_all, prompts)
        request_id, collector = self._collect_embeddings(token_ids, dimensions)
        try:
            return await asyncio.wrap_future(collector.future)
        except asyncio.CancelledError:
            self._abort_if_running(request_id)
            raise

    def _collect_embeddings(
        self, token_ids: Sequence[list[int]], dimensions: int | None
    ) -> tuple[str, EmbeddingCollector]:
        request_id = uuid4().hex
        collector = EmbeddingCollector(len(token_ids))
        self.submit_embedding(request_id, token_ids, dimensions=dimensions, on_output=collector)
        return request_id, collector

    def _collect(self, prompt: list[int], params: SamplingParams) -> tuple[str, Collector]:
        request_id = uuid4().hex
        collector = Collector(request_id, params.n)
        self.submit(request_id, prompt, params, on_output=collector)
        return request_id, collector

    def _generate_all(self, prompts: list[list[int]], params: list[SamplingParams]) -> list[GenerationOutput]:
        waiting: list[tuple[str, Collector]] = []
        try:
            for prompt, sampling in zip(prompts, params, strict=True):
                waiting.append(self._collect(prompt, sampling))
            return [output for _, collector in waiting for output in collector.future.result()]
        except BaseException:
            for request_id, _ in waiting:
                self._abort_if_running(request_id)
            raise

    def _abort_if_running(self, request_id: str) -> None:
        supervisor = self._supervisor
        if supervisor is not None:
            supervisor.abort(request_id)
