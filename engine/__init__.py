"""Prompts in, tokens out: continuous batching with a paged KV cache, the model in a child process."""

from engine.config import EngineConfig
from engine.engine import InferenceEngine
from engine.errors import (
    ContextLengthError,
    DeviceLostError,
    DeviceMemoryError,
    EngineDiedError,
    EngineError,
    EngineNotRunningError,
    InvalidRequestError,
    ModelLoadError,
)
from engine.grammar_spec import GrammarSpec
from engine.messages import EngineInfo
from engine.outputs import GenerationOutput, RequestOutput, TokenLogprob
from engine.sampling_params import SamplingParams

__all__ = [
    "ContextLengthError",
    "DeviceLostError",
    "DeviceMemoryError",
    "EngineConfig",
    "EngineDiedError",
    "EngineError",
    "EngineInfo",
    "EngineNotRunningError",
    "GenerationOutput",
    "GrammarSpec",
    "InferenceEngine",
    "InvalidRequestError",
    "ModelLoadError",
    "RequestOutput",
    "SamplingParams",
    "TokenLogprob",
]
