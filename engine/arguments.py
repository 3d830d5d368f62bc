"""Checks the arguments of the engine's public calls, prompts apart (`engine.prompt_reader`). Values in, values out."""

from collections.abc import Sequence
from dataclasses import fields as fields_of
from typing import Any

from engine.config import EngineConfig
from engine.errors import InvalidRequestError
from engine.field_types import require, shown
from engine.sampling_params import SamplingParams

_MAX_PRIORITY = 2**53  # what JSON carries exactly
_MAX_DEADLINE = 1e18  # epoch seconds; shuts out infinity and NaN


def read_config(fields: dict[str, Any]) -> EngineConfig:
    known = {field.name for field in fields_of(EngineConfig)}
    for name in fields:
        if name not in known:
            raise InvalidRequestError(
                f"{name} is not a field of EngineConfig; the fields are {sorted(known)}", param=name
            )
    return EngineConfig(**fields)


def read_params(params: SamplingParams | None) -> SamplingParams:
    if params is None:
        return SamplingParams()
    if not isinstance(params, SamplingParams):
        raise InvalidRequestError(f"params must be SamplingParams; got {shown(params)}", param="params")
    return params


def check_placing(priority: int, deadline: float | None, cache_key: str) -> None:
    require(
        type(priority) is int and abs(priority) <= _MAX_PRIORITY,
        "priority",
        f"must be an integer from -{_MAX_PRIORITY} to {_MAX_PRIORITY}",
        priority,
    )
    is_number = isinstance(deadline, int | float) and not isinstance(deadline, bool) and abs(deadline) < _MAX_DEADLINE
    require(deadline is None or is_number, "deadline", "must be a finite number of epoch seconds, or None", deadline)
    require(isinstance(cache_key, str), "cache_key", "must be a string", cache_key)


def read_one_choice(params: SamplingParams | None) -> SamplingParams:
    params = read_params(params)
    if params.n != 1:
        raise InvalidRequestError(f"n must be 1 here, got {params.n}: use generate_batch or submit", param="n")
    return params


def read_params_for_each(
    params: SamplingParams | Sequence[SamplingParams] | None, num_prompts: int
) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [read_params(params)] * num_prompts
    if not isinstance(params, list | tuple) or len(params) != num_prompts:
        raise InvalidRequestError(
            f"params must be one SamplingParams for all {num_prompts} prompts or a list with one for each",
            param="params",
        )
    return [read_params(item) for item in params]
