"""Checks the values of a dataclass against its annotations, and shows values that came from outside in messages."""

from dataclasses import fields
from functools import cache
from types import UnionType
from typing import Any, cast, get_args, get_origin

from engine.errors import InvalidRequestError


def check_field_types(values: Any) -> None:
    """Raises `InvalidRequestError` naming the first wrong field. Knows plain types, `|` and tuples."""
    for field in fields(values):
        value, annotation = getattr(values, field.name), cast(Any, field.type)
        if type(value) not in _plain_types(annotation) and not _is_instance(value, annotation):
            expected = getattr(field.type, "__name__", None) if isinstance(field.type, type) else None
            require(False, field.name, f"must be {expected or field.type}", value)


@cache
def _plain_types(annotation: Any) -> frozenset[type]:
    """Types whose every value fits: there are a few dozen fields to a request, and nearly all hold such a value."""
    if isinstance(annotation, UnionType):
        return frozenset().union(*map(_plain_types, get_args(annotation)))
    if annotation is float:
        return frozenset((int, float))
    return frozenset((annotation,)) if isinstance(annotation, type) and get_origin(annotation) is None else frozenset()


def _is_instance(value: object, annotation: Any) -> bool:
    if isinstance(annotation, UnionType):
        return any(_is_instance(value, option) for option in get_args(annotation))
    if get_origin(annotation) is tuple:
        return isinstance(value, tuple) and _are_instances(value, get_args(annotation))
    if isinstance(value, bool) or annotation is bool:
        return isinstance(value, bool) and annotation is bool
    if annotation is float:
        return isinstance(value, int | float)
    return isinstance(value, annotation)


def _are_instances(items: tuple[object, ...], types: tuple[Any, ...]) -> bool:
    if types[-1] is Ellipsis:
        return all(_is_instance(item, types[0]) for item in items)
    return len(items) == len(types) and all(map(_is_instance, items, types))


def require(condition: bool, param: str, rule: str, value: object) -> None:
    """Raise `InvalidRequestError` for `param` unless its rule holds."""
    if not condition:
        raise InvalidRequestError(f"{param} {rule}; got {shown(value)}", param=param)


def shown(value: object) -> str:
    """A value as a message shows it, whatever its size."""
    try:
        return _ends(repr(value), 80)
    except ValueError:
        return "an integer of thousands of digits"


def shortened(text: str) -> str:
    """A library's message, which may hold all that the library was given: long lines, and all of it, by both ends."""
    return _ends("\n".join(_ends(line, 200) for line in text.strip().splitlines()), 1000)


def _ends(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most // 2]} … {text[-most // 2 :]}"
