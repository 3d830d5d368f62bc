"""Gathers a request's outputs into whole answers, for callers who wait for the end."""

from concurrent.futures import Future

import numpy as np
from numpy.typing import NDArray

from engine.errors import EngineError
from engine.outputs import GenerationOutput, RequestOutput, TokenLogprob, raise_for_error


class Collector:
    """Pass it as `on_output`; `future` then holds one `GenerationOutput` a choice, in their order."""

    def __init__(self, request_id: str, num_choices: int) -> None:
        self.future: Future[list[GenerationOutput]] = Future()
        self.future.set_running_or_notify_cancel()  # whoever stops waiting aborts the request instead
        self._request_id = request_id
        self._texts: list[list[str]] = [[] for _ in range(num_choices)]
        self._token_ids: list[list[int]] = [[] for _ in range(num_choices)]
        self._logprobs: list[list[TokenLogprob]] = [[] for _ in range(num_choices)]
        self._has_logprobs = False
        self._prompt_logprobs: list[TokenLogprob | None] | None = None  # of choice 0
        self._last: dict[int, RequestOutput] = {}

    def __call__(self, output: RequestOutput) -> None:
        self._texts[output.index].append(output.text)
        self._token_ids[output.index] += output.token_ids
        if output.logprobs is not None:
            self._logprobs[output.index] += output.logprobs
            self._has_logprobs = True
        self._prompt_logprobs = output.prompt_logprobs or self._prompt_logprobs
        self._last[output.index] = output
        if output.finished:
            self.future.set_result([self._generation(index) for index in range(len(self._texts))])

    def _generation(self, index: int) -> GenerationOutput:
        last = self._last[index]
        return GenerationOutput(
            request_id=self._request_id,
            index=index,
            text="".join(self._texts[index]),
            token_ids=self._token_ids[index],
            finished=True,
            finish_reason=last.finish_reason,
            logprobs=self._logprobs[index] if self._has_logprobs else None,
            prompt_logprobs=self._prompt_logprobs if index == 0 else None,
            error=last.error,
            error_kind=last.error_kind,
        )


class EmbeddingCollector:
    """Pass it as `on_output`; `future` then holds the vectors `[num_prompts, dimensions]`, or the error of one."""

    def __init__(self, num_prompts: int) -> None:
        self.future: Future[NDArray[np.float32]] = Future()
        self.future.set_running_or_notify_cancel()  # whoever stops waiting aborts the request instead
        self._vectors: list[NDArray[np.float32] | None] = [None] * num_prompts
        self._error: EngineError | None = None

    def __call__(self, output: RequestOutput) -> None:
        self._vectors[output.index] = output.embedding
        try:
            raise_for_error(output)
        except EngineError as error:
            self._error = self._error or error
        if not output.finished:
            return
        vectors = [vector for vector in self._vectors if vector is not None]
        if self._error is None and len(vectors) < len(self._vectors):
            self._error = EngineError(f"request {output.request_id} was aborted")
        if self._error is not None:
            self.future.set_exception(self._error)
        else:
            self.future.set_result(np.stack(vectors))
