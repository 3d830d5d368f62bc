"""An engine without a model: `InferenceEngine`'s interface for workers, deterministic tokens, and knobs for failures.
A token's text is its number; the tokens follow from prompt, seed and choice alone."""

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.embedding_reader import EmbeddingReader
from engine.errors import EngineDiedError, EngineNotRunningError, InvalidRequestError
from engine.messages import EngineInfo
from engine.outputs import ErrorKind, RequestOutput, TokenLogprob
from engine.pooling import Pooling
from engine.sampling_params import SamplingParams
from tests.fakes.fake_embeddings import HIDDEN_SIZE, EmbeddingRequest
from tests.fakes.fake_tokenizer import POISON_TOKEN, VOCAB_SIZE, FakeTokenBytes, FakeTokenizer, text_of

OnOutput = Callable[[RequestOutput], None]


def expected_tokens(prompt_token_ids: list[int], params: SamplingParams, index: int = 0) -> list[int]:
    """What the fake answers."""
    start = sum(prompt_token_ids) + params.seed + 31 * index
    return [(start + 7 * position) % VOCAB_SIZE for position in range(params.max_tokens or 16)]


def expected_logprob(token_id: int, num_top: int) -> TokenLogprob:
    return TokenLogprob(token_id, -token_id / 8, [(token_id + i, -i / 4) for i in range(num_top)])


@dataclass
class _Request:
    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    on_output: OnOutput
    priority: int = 0
    deadline: float | None = None
    cache_key: str = ""
    stored: list[list[int]] = field(default_factory=list)  # tokens of each choice that came with the request
    failure: tuple[str, ErrorKind] | None = None
    answers: list[list[int]] = field(default_factory=list)
    num_tokens: list[int] = field(default_factory=list)  # of each choice so far
    script: list[str] | None = None  # the text of each token of every answer

    def __post_init__(self) -> None:
        self.answers = [expected_tokens(self.prompt_token_ids, self.params, index) for index in range(self.params.n)]
        if self.script is not None:
            self.answers = [list(range(len(self.script))) for _ in range(self.params.n)]
        self.num_tokens = [0] * self.params.n

    @property
    def open_choices(self) -> list[int]:
        return [i for i, answer in enumerate(self.answers) if self.num_tokens[i] < len(answer)]

    def take(self, index: int, token_ids: list[int], *, is_replay: bool = False) -> None:
        """One output with tokens."""
        offset, script = self.num_tokens[index], self.script
        self.num_tokens[index] += len(token_ids)
        is_last = self.num_tokens[index] >= len(self.answers[index])
        self.on_output(
            RequestOutput(
                request_id=self.request_id,
                index=index,
                token_offset=offset,
                token_ids=token_ids,
                text=text_of(token_ids) if script is None else "".join(script[token_id] for token_id in token_ids),
                logprobs=None if is_replay else self._logprobs(token_ids),
                prompt_logprobs=self._prompt_logprobs() if offset == 0 and index == 0 and not is_replay else None,
                finish_reason=None if not is_last else "length" if script is None else "stop",
                finished=not self.open_choices,
                is_replay=is_replay,
            )
        )

    def _logprobs(self, token_ids: list[int]) -> list[TokenLogprob] | None:
        num_top = self.params.logprobs
        return None if num_top is None else [expected_logprob(token_id, num_top) for token_id in token_ids]

    def _prompt_logprobs(self) -> list[TokenLogprob | None] | None:
        num_top = self.params.prompt_logprobs
        if num_top is None:
            return None
        return [None, *(expected_logprob(token_id, num_top) for token_id in self.prompt_token_ids[1:])]


class FakeEngine:
    """Steps on a thread of its own: one token a choice a step. Callbacks run on that thread, like the real one's."""

    def __init__(
        self,
        *,
        step_seconds: float = 0.001,
        max_model_len: int = 4096,
        chat_template: str | None = None,
        script: list[str] | None = None,
    ) -> None:
        """`script`: the text of each token of every answer, which then stops by itself."""
        self.tokenizer = FakeTokenizer(chat_template)
        self.script = script
        if script is not None:
            self.tokenizer.token_bytes = FakeTokenBytes(enumerate(text.encode() for text in script))
        self.info = EngineInfo(
            model_dir="fake",
            device="cpu",
            dtype="float32",
            attention="none",
            max_model_len=max_model_len,
            vocab_size=VOCAB_SIZE,
            eos_token_ids=(0,),
            block_size=16,
            num_kv_blocks=100_000,
            fingerprint="fake",
            hidden_size=HIDDEN_SIZE,
        )
        self.embedding_reader = EmbeddingReader(self.tokenizer, self.info, pooling=Pooling())  # type: ignore[arg-type]
        self.step_seconds = step_seconds
        self.after_outputs: Callable[[], None] = lambda: None
        self.output_interval_seconds = 0.0
        self.submitted: list[str] = []  # as JOB_ID:ATTEMPT
        self.requests: list[Any] = []  # everything that was ever submitted
        self.num_resumed_tokens: dict[str, int] = {}  # by JOB_ID:ATTEMPT
        self.last_step_at = time.monotonic()
        self.is_healthy = True
        self._requests: dict[str, Any] = {}
        self._lock = threading.Lock()
        self._going = threading.Event()
        self._going.set()
        self._most_tokens = math.inf
        self._work = threading.Event()
        self._is_stopped = False
        self._thread: threading.Thread | None = None

    def launch(self) -> None: ...

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="fake-engine", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._is_stopped = True
        self._going.set()
        self._work.set()
        if self._thread is not None:
            self._thread.join()

    def submit_embedding(
        self, request_id: str, prompts: list[list[int]], *, dimensions: int | None = None, **placing: Any
    ) -> None:
        self._take_in(EmbeddingRequest(request_id, prompts, dimensions, **placing))

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
        stored = [list(token_ids) for token_ids in output_token_ids]
        request = _Request(
            request_id, prompt_token_ids, params, on_output, priority, deadline, cache_key, stored, script=self.script
        )
        self.num_resumed_tokens[_attempt(request_id)] = sum(map(len, stored))
        self._take_in(request)

    def _take_in(self, request: Any) -> None:
        if not self.is_healthy:
            raise EngineDiedError("the fake died")
        if self._is_stopped:
            raise EngineNotRunningError("the fake was stopped")
        with self._lock:
            if request.request_id in self._requests:
                raise InvalidRequestError(f"request_id {request.request_id!r} is in use", param="request_id")
            self.submitted.append(_attempt(request.request_id))
            self.requests.append(request)
            self._requests[request.request_id] = request
        self._work.set()

    def abort(self, request_id: str) -> None:
        with self._lock:
            request = self._requests.get(request_id)
            if request is not None:
                self._end(request, finish_reason="cancelled")

    def get_stats(self) -> dict[str, Any]:
        with self._lock:
            num_running = len(self._requests)
        return {"num_running": num_running, "num_waiting": 0, "num_kv_blocks_used": 0, "num_kv_blocks_free": 100_000}

    # knobs

    def pause(self) -> None:
        """No more tokens until `go_on`; aborts still work."""
        self._going.clear()

    def hold_after(self, num_tokens: int) -> None:
        """No answer becomes longer than this until `go_on`, and none that is longer ends; aborts still work."""
        self._most_tokens = num_tokens

    def go_on(self) -> None:
        self._most_tokens = math.inf
        self._going.set()

    def fail(self, job_id: str, message: str = "out of luck", kind: ErrorKind = "refused") -> None:
        """End the job's request with an error."""
        with self._lock:
            for request in [r for r in self._requests.values() if r.request_id.startswith(f"{job_id}:")]:
                self._end(request, finish_reason="error", error=message, kind=kind)

    def die(self) -> None:
        """As if the child could not be started again."""
        with self._lock:
            self.is_healthy = False
            for request in list(self._requests.values()):
                self._end(request, finish_reason="error", error="the fake died", kind="died")

    @property
    def running(self) -> list[str]:
        """As JOB_ID:ATTEMPT."""
        with self._lock:
            return [_attempt(request_id) for request_id in self._requests]

    def _end(
        self, request: Any, *, finish_reason: Any, error: str | None = None, kind: ErrorKind | None = None
    ) -> None:
        del self._requests[request.request_id]
        _replay(request)
        for index in request.open_choices:
            request.on_output(
                RequestOutput(
                    request_id=request.request_id,
                    index=index,
                    token_offset=request.num_tokens[index],
                    token_ids=[],
                    text="",
                    finish_reason=finish_reason,
                    error=error,
                    error_kind=kind,
                    finished=index == request.open_choices[-1],
                )
            )
        self.after_outputs()

    def _run(self) -> None:
        while not self._is_stopped:
            self._work.wait()
            self._going.wait()
            with self._lock:
                for request in list(self._requests.values()):
                    self._step(request)
                self.after_outputs()
                if not self._requests:
                    self._work.clear()
            self.last_step_at = time.monotonic()
            time.sleep(self.step_seconds)

    def _step(self, request: Any) -> None:
        if POISON_TOKEN in request.prompt_token_ids:
            os.kill(os.getpid(), signal.SIGKILL)
        _replay(request)
        in_step = [index for index in request.open_choices if request.num_tokens[index] < self._most_tokens]
        for index in in_step[:1] if isinstance(request, EmbeddingRequest) else in_step:
            request.take(index, [request.answers[index][request.num_tokens[index]]])
        if not request.open_choices:
            self._requests.pop(request.request_id, None)


def _replay(request: Any) -> None:
    """Before anything else becomes of it, an abort included."""
    for index, token_ids in enumerate(request.stored):
        if token_ids:
            request.take(index, token_ids[: len(request.answers[index])], is_replay=True)
    request.stored = []


def _attempt(request_id: str) -> str:
    """JOB_ID:ATTEMPT, of a worker's JOB_ID:ATTEMPT:EXECUTION_ID."""
    return request_id.rpartition(":")[0]
