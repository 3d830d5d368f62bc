"""The contract's job in the engine's terms: tokens and sampling parameters. Knows nothing of Redis.

Everything a job can be refused for before it runs is refused here, by the name of its field.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from engine.embedding_reader import EmbeddingReader
from engine.errors import InvalidRequestError
from engine.grammar_spec import GrammarSpec
from engine.messages import EngineInfo
from engine.prompt_reader import NO_OUTPUT_LAYER
from engine.sampling_params import SamplingParams
from engine.tokenizer import Tokenizer
from producer.contract import ErrorCode, JobRequest, Marker, PromptEcho, summarize
from worker.chat import ChatRenderer
from worker.errors import JobRefusedError
from worker.logprobs import LogprobWriter
from worker.output_format import grammar_spec
from worker.parsing.call_grammar import call_grammar
from worker.parsing.model_format import ModelFormat
from worker.parsing.output_plan import OutputPlan

MAX_MARKER_TOKENS = 16  # of a marker that ends a prompt, and the white space behind it
_UINT64_MASK = 2**64 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class TranslatedJob:
    """A job as the engine runs it. Equal tokens, parameters and seed give equal answers."""

    request: JobRequest
    prompt_token_ids: list[int]
    params: SamplingParams
    seed: int
    to_embed: list[list[int]] = field(default_factory=list)
    """The token ids of each input, where no answer is wanted but their embeddings."""
    output_plan: OutputPlan | None = None
    """How its outputs are read; None: they are content."""
    echo: PromptEcho | None = None  # the prompt, if it is to come back

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids) + sum(map(len, self.to_embed))


class Translator:
    """Translates jobs for one model. Thread-safe."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        chat: ChatRenderer,
        model_format: ModelFormat,
        info: EngineInfo,
        model_names: Sequence[str],
        embedding_reader: EmbeddingReader,
    ) -> None:
        self._embedding_reader = embedding_reader
        self._tokenizer = tokenizer
        self._chat = chat
        self._model_format = model_format
        self._info = info
        self._model_names = tuple(model_names)
        self.writer = LogprobWriter(tokenizer)

    def translate(self, job_id: str, kwargs: dict[str, Any], begun: Marker | None = None) -> TranslatedJob:
        """Raises JobRefusedError with the contract's code and the field at fault.

        `begun`: the marker of an attempt that this one carries on. Its prompt and seed count, whatever the template or
        the tokenizer would make of the job today.
        """
        request = self._validate(kwargs)
        self._check_model(request)
        if request.task == "embed":
            return self._translate_embedding(request)
        if not self._info.can_generate:
            raise JobRefusedError(NO_OUTPUT_LAYER, param="task", code=ErrorCode.UNSUPPORTED)
        prompt_token_ids = (begun and begun.prompt_token_ids) or self._tokenize(request)
        output_plan = self._plan_output(request, prompt_token_ids)
        self._check_token_ids(request.stop_token_ids, "stop_token_ids")
        self._check_token_ids([int(token_id) for token_id in request.logit_bias or ()], "logit_bias")
        max_tokens = self._fit(len(prompt_token_ids), request)
        seed = default_seed(job_id) if request.seed is None else request.seed & _UINT64_MASK
        if begun is not None and begun.seed is not None:
            seed = begun.seed
        try:
            grammar = self._grammar(request, output_plan)
            params = _sampling_params(request, output_plan, grammar, max_tokens=max_tokens, seed=seed)
        except InvalidRequestError as error:
            raise JobRefusedError(str(error), param=error.param) from error
        return TranslatedJob(
            request=request,
            prompt_token_ids=prompt_token_ids,
            params=params,
            seed=seed,
            output_plan=output_plan,
            echo=self.writer.echo(prompt_token_ids) if request.echo else None,
        )

    def _translate_embedding(self, request: JobRequest) -> TranslatedJob:
        inputs = request.to_embed
        names = [f"inputs[{at}]" for at in range(len(inputs))] if request.inputs is not None else ["prompt"]
        try:
            self._embedding_reader.pooling(request.dimensions)
        except InvalidRequestError as error:
            code = ErrorCode.UNSUPPORTED if error.param == "task" else ErrorCode.INVALID_REQUEST
            raise JobRefusedError(str(error), param=error.param, code=code) from error
        try:
            encoded = iter(self._embedding_reader.encode([text for text in inputs if isinstance(text, str)]))
        except InvalidRequestError as error:
            raise JobRefusedError(str(error), param=names[0]) from error
        to_embed = [next(encoded) if isinstance(text, str) else text for text in inputs]
        for name, token_ids in zip(names, to_embed, strict=True):
            self._check_input(token_ids, name)
        return TranslatedJob(request=request, prompt_token_ids=[], params=SamplingParams(), seed=0, to_embed=to_embed)

    def _check_input(self, token_ids: list[int], name: str) -> None:
        self._check_token_ids(token_ids, name)
        if not token_ids:
            raise JobRefusedError(f"{name} comes to no tokens; give more text", param=name)
        if len(token_ids) > self._info.max_model_len:
            message = f"{name} has {len(token_ids)} tokens; {self._limit()}: shorten it"
            raise JobRefusedError(message, param=name, code=ErrorCode.CONTEXT_LENGTH_EXCEEDED)

    def _validate(self, kwargs: dict[str, Any]) -> JobRequest:
        try:
            return JobRequest.model_validate(kwargs)
        except ValidationError as error:
            raise _refusal(error) from error

    def _check_model(self, request: JobRequest) -> None:
        if request.model is not None and request.model not in self._model_names:
            raise JobRefusedError(
                f"model {request.model!r} is not served here; this worker serves {', '.join(self._model_names)}: "
                "name one of them, or send the job to the queue of a worker that serves the model",
                param="model",
                code=ErrorCode.MODEL_NOT_FOUND,
            )

    def _tokenize(self, request: JobRequest) -> list[int]:
        if isinstance(request.prompt, list):
            self._check_token_ids(request.prompt, "prompt")
            return request.prompt
        param = "prompt" if request.messages is None else "messages"
        try:
            if request.messages is not None:
                text = self._chat.render(  # with the special tokens in it
                    request.messages, tools=request.callable_tools, template_kwargs=request.chat_template_kwargs
                )
                token_ids = self._tokenizer.encode(text, add_special_tokens=False)
            else:
                token_ids = self._tokenizer.encode(request.prompt or "")
        except InvalidRequestError as error:
            raise JobRefusedError(str(error), param=param) from error
        if not token_ids:
            raise JobRefusedError(f"{param} comes to no tokens; give more text", param=param)
        return token_ids

    def _plan_output(self, request: JobRequest, prompt_token_ids: list[int]) -> OutputPlan | None:
        """A function of the job and the prompt's tokens, so that a resume reads its outputs alike."""
        if request.messages is None:
            return None
        end = self._tokenizer.decode(prompt_token_ids[-MAX_MARKER_TOKENS:], skip_special_tokens=False)
        return OutputPlan.of_chat(request, end, self._model_format)

    def _grammar(self, request: JobRequest, plan: OutputPlan | None) -> GrammarSpec | None:
        if plan is not None and plan.tool_calls is not None:
            return call_grammar(request, plan, self._model_format)
        return grammar_spec(request)

    def _check_token_ids(self, token_ids: list[int], param: str) -> None:
        if token_ids and max(token_ids) >= self._info.vocab_size:
            raise JobRefusedError(
                f"{param} holds token id {max(token_ids)}; the model's ids end at {self._info.vocab_size - 1}",
                param=param,
            )

    def _fit(self, num_prompt_tokens: int, request: JobRequest) -> int:
        """The output's limit in tokens: what was asked for, or what is left of the context."""
        param = "prompt" if request.messages is None else "messages"
        room = self._info.max_model_len - num_prompt_tokens
        if request.min_tokens > room >= 1:
            raise JobRefusedError(
                f"{param} has {num_prompt_tokens} tokens and min_tokens is {request.min_tokens}; {self._limit()}: "
                f"shorten {param}, or ask for at most {room} tokens",
                param="min_tokens",
                code=ErrorCode.CONTEXT_LENGTH_EXCEEDED,
            )
        if room < 1:
            raise JobRefusedError(
                f"{param} has {num_prompt_tokens} tokens; {self._limit()}, and the output needs at least one: "
                "shorten it",
                param=param,
                code=ErrorCode.CONTEXT_LENGTH_EXCEEDED,
            )
        if request.max_tokens is not None and request.max_tokens > room:
            raise JobRefusedError(
                f"{param} has {num_prompt_tokens} tokens and max_tokens is {request.max_tokens}, together "
                f"{num_prompt_tokens + request.max_tokens}; {self._limit()}: shorten {param}, or ask for at most "
                f"{room} tokens",
                param="max_tokens",
                code=ErrorCode.CONTEXT_LENGTH_EXCEEDED,
            )
        return request.max_tokens if request.max_tokens is not None else room

    def _limit(self) -> str:
        """In the words by which LiteLLM and inspect-ai know it for the context's, and shorten the prompt."""
        cause = ", all that this worker's KV cache holds" if self._info.is_bound_by_cache else ""
        return f"this model's maximum context length is {self._info.max_model_len} tokens{cause}"


def default_seed(job_id: str) -> int:
    """The seed of a job that names none: a stable hash of its id, so that every attempt draws the same."""
    return int.from_bytes(hashlib.blake2b(job_id.encode(), digest_size=8).digest(), "big")


def _sampling_params(
    request: JobRequest, plan: OutputPlan | None, grammar: GrammarSpec | None, *, max_tokens: int, seed: int
) -> SamplingParams:
    return SamplingParams(
        max_tokens=max_tokens,
        n=request.n,
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=None if request.top_k == -1 else request.top_k,
        min_p=request.min_p,
        seed=seed,
        stop=tuple(request.stop),
        stop_token_ids=tuple(request.stop_token_ids),
        ignore_eos=request.ignore_eos,
        visible_token_ids=plan.visible_token_ids if plan else (),
        min_tokens=request.min_tokens,
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        repetition_penalty=request.repetition_penalty,
        logit_bias=tuple((int(token_id), bias) for token_id, bias in (request.logit_bias or {}).items()),
        logprobs=request.top_logprobs if request.logprobs else None,
        prompt_logprobs=request.top_logprobs if request.logprobs and request.echo else None,
        grammar=grammar,
    )


def _refusal(error: ValidationError) -> JobRefusedError:
    problem = summarize(error)
    return JobRefusedError(problem.message, param=problem.param)
