"""What the contract's models share: rules of our own, worded for people, and values that travel and are rendered."""

import json
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictInt, StrictStr, model_validator
from pydantic_core import PydanticCustomError

MAX_UNKNOWN_FIELDS = 4  # of an object, that are named: a body may hold hundreds of thousands
MAX_NESTING = 64  # of arrays and objects: deeper ones are no requests, and recursion ends somewhere

MAX_SMALL_JSON_BYTES = 64 << 10  # of what is the caller's own, and travels with the job

_CONTAINERS = (dict, list, tuple)
CONTRACT_RULE = "contract_rule"  # pydantic's error type for a rule of ours; `ctx["param"]` names the field


def breaks_rule(param: str, rule: str) -> PydanticCustomError:
    """To be raised in a validator. `param`: a field of the model that is validated, or empty for what is checked."""
    return PydanticCustomError(CONTRACT_RULE, "{rule}", {"param": param, "rule": rule})


def check_unicode(text: str) -> str:
    """JSON can carry half a surrogate pair, which is no character and which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise breaks_rule("", f"character {error.start} is a lone surrogate; give valid Unicode") from None
    return text


def is_deeper(value: Any, limit: int) -> bool:
    """Whether arrays and objects lie in each other deeper than that."""
    level = [value] if isinstance(value, _CONTAINERS) else []
    for _ in range(limit):
        level = [
            child
            for parent in level
            for child in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(child, _CONTAINERS)
        ]
        if not level:
            return False
    return True


def count_json_bytes(value: Any) -> int:
    """Of a value whose shape is not ours to say. Raises a rule for what JSON or a tokenizer cannot take."""
    if is_deeper(value, MAX_NESTING):
        raise breaks_rule("", f"is nested deeper than {MAX_NESTING} levels")
    try:
        return len(json.dumps(value, ensure_ascii=False, allow_nan=False).encode())
    except (TypeError, ValueError) as error:
        raise breaks_rule("", f"cannot be written as JSON ({error}); give plain JSON values in valid Unicode") from None


def _check_json(value: dict[str, Any]) -> dict[str, Any]:
    count_json_bytes(value)
    return value


def _check_small_json(value: dict[str, Any]) -> dict[str, Any]:
    if (size := count_json_bytes(value)) > MAX_SMALL_JSON_BYTES:
        raise breaks_rule("", f"must take at most {MAX_SMALL_JSON_BYTES} bytes as JSON; got {size}: give less")
    return value


class ContractModel(BaseModel):
    """A part of a request: values that do not change, and no field but its own."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _name_few_unknown_fields(cls, values: Any) -> Any:
        """Each would be an error of its own, which takes a kilobyte and longer than all else of a request."""
        if isinstance(values, dict) and len(values) > len(cls.model_fields):
            unnamed = set([name for name in values if name not in cls.model_fields][MAX_UNKNOWN_FIELDS:])
            return {name: value for name, value in values.items() if name not in unnamed}
        return values


TokenId = Annotated[StrictInt, Field(ge=0)]
Number = Annotated[float, Field(strict=True)]  # a whole number will do; text and true do not
Text = Annotated[StrictStr, AfterValidator(check_unicode)]
NonEmptyText = Annotated[StrictStr, Field(min_length=1), AfterValidator(check_unicode)]
JsonObject = Annotated[dict[str, Any], AfterValidator(_check_json)]
SmallJsonObject = Annotated[dict[str, Any], AfterValidator(_check_small_json)]
FirstFault = Field(fail_fast=True)  # of a list: a million faults would be a million errors
