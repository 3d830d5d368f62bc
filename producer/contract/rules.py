"""What the contract's models share: rules of our own, worded for people, and values that travel and are rendered."""

import json
from typing import Annotated, Any

from pydantic import AfterValidator, Field, StrictInt, StrictStr
from pydantic_core import PydanticCustomError

MAX_NESTING = 64  # of arrays and objects: deeper ones are no requests, and recursion ends somewhere

CONTRACT_RULE = "contract_rule"  # pydantic's error type for a rule of ours; `ctx["param"]` names the field


def breaks_rule(param: str, rule: str) -> PydanticCustomError:
    """To be raised in a validator. `param`: a field of the model that is validated, or empty for what is checked."""
    return PydanticCustomError(CONTRACT_RULE, "{rule}", {"param": param, "rule": rule})


def _check_unicode(text: str) -> str:
    """JSON can carry half a surrogate pair, which is no character and which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise breaks_rule("", f"character {error.start} is a lone surrogate; give valid Unicode") from None
    return text


def is_deeper(value: Any, limit: int) -> bool:
    """Whether arrays and objects lie in each other deeper than that."""
    level = [value]
    for _ in range(limit):
        level = [
            child
            for parent in level
            if isinstance(parent, dict | list | tuple)
            for child in (parent.values() if isinstance(parent, dict) else parent)
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


TokenId = Annotated[StrictInt, Field(ge=0)]
Number = Annotated[float, Field(strict=True)]  # a whole number will do; text and true do not
Text = Annotated[StrictStr, AfterValidator(_check_unicode)]
NonEmptyText = Annotated[StrictStr, Field(min_length=1), AfterValidator(_check_unicode)]
JsonObject = Annotated[dict[str, Any], AfterValidator(_check_json)]
