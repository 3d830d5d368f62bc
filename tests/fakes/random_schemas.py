"""Random JSON Schemas of the kinds that people write, bounded so that an answer ends: by hand, from a seed."""

import random
from collections.abc import Callable
from typing import Any

Schema = dict[str, Any]
_WORDS = ["id", "name", "unit price", "größe", "a_b", "x-y", "tags", "$ref_", "owner", '"q"']


def random_schema(seed: int) -> Schema:
    """Equal seeds give equal schemas."""
    rng = random.Random(seed)
    schema = _any(rng, depth=3)
    if rng.random() < 0.3:
        schema = {"$defs": {"part": _any(rng, depth=1)}, **_object(rng, depth=2)}
        schema["properties"]["part"] = {"$ref": "#/$defs/part"}
        schema["required"] = [*schema["required"], "part"]
    return schema


def _any(rng: random.Random, depth: int) -> Schema:
    simple = [_string, _integer, _number, _choice, _constant, _plain]
    nested = [_object, _object, _array, _tuple, _any_of]
    make: Callable[[random.Random, int], Schema] = rng.choice(simple + nested if depth else simple)
    return make(rng, depth - 1)


def _object(rng: random.Random, depth: int) -> Schema:
    names = rng.sample(_WORDS, rng.randint(0, 4))
    schema: Schema = {"type": "object", "properties": {name: _any(rng, max(depth, 0)) for name in names}}
    schema["required"] = [name for name in names if rng.random() < 0.6]
    schema["additionalProperties"] = rng.choice([False, False, False, {"type": "null"}])
    return schema


def _array(rng: random.Random, depth: int) -> Schema:
    lowest = rng.randint(0, 2)
    return {
        "type": "array",
        "items": _any(rng, max(depth, 0)),
        "minItems": lowest,
        "maxItems": lowest + rng.randint(0, 2),
    }


def _tuple(rng: random.Random, depth: int) -> Schema:
    items = [_any(rng, 0) for _ in range(rng.randint(1, 3))]
    return {"type": "array", "prefixItems": items, "items": False, "minItems": rng.randint(0, len(items))}


def _any_of(rng: random.Random, depth: int) -> Schema:
    return {"anyOf": [_any(rng, max(depth, 0)) for _ in range(rng.randint(2, 3))]}


def _string(rng: random.Random, depth: int) -> Schema:
    lowest = rng.randint(0, 3)
    return rng.choice(
        [
            {"type": "string", "minLength": lowest, "maxLength": lowest + rng.randint(0, 5)},
            {
                "type": "string",
                "pattern": rng.choice(["^[a-z]{2,5}$", "^(ja|nein)$", r"^\d{3}-\d{2}$", '^[^\\s"]{1,4}$']),
            },
            {"type": "string", "format": rng.choice(["date", "uuid", "ipv4", "email"])},
        ]
    )


def _integer(rng: random.Random, depth: int) -> Schema:
    lowest = rng.randint(-200, 50)
    bounds = rng.choice([("minimum", "maximum"), ("exclusiveMinimum", "exclusiveMaximum")])
    schema: Schema = {"type": "integer", bounds[0]: lowest, bounds[1]: lowest + rng.randint(2, 300)}
    return schema


def _number(rng: random.Random, depth: int) -> Schema:
    lowest = rng.randint(-5, 5)
    return {"type": "number", "minimum": lowest, "maximum": lowest + rng.randint(1, 9)}


def _choice(rng: random.Random, depth: int) -> Schema:
    return {"enum": rng.sample(["a", "b c", 1, -2.5, None, True, [], {"k": [1]}, "ü\n", ""], rng.randint(1, 5))}


def _constant(rng: random.Random, depth: int) -> Schema:
    return {"const": rng.choice(["fixed", 7, None, {"a": {"b": []}}, [1, "two"]])}


def _plain(rng: random.Random, depth: int) -> Schema:
    return {"type": rng.choice(["boolean", "null"])}
