"""Whether a value is of a kind that its key takes, which the key's type says."""

import functools
import math
import numbers
import types
import typing
from collections.abc import Mapping
from dataclasses import fields
from typing import Any


# How a message calls each kind.
WORDS = {
    bool: "true or false", int: "a whole number", float: "a number", str: "text", list: "a list",
    dict: "`key: value` pairs",
}  # fmt: skip
# Hinted as plain numbers, and None is taken all the same.
_MAY_BE_NONE = ("logging_steps", "save_steps")


@functools.cache
def field_types(cls: type) -> Mapping[str, Any]:
    """The types of a dataclass's fields that can be given."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in fields(cls) if field.init}


def kinds_of(its_type: Any) -> set[Any]:
    """The classes that a type joins, without what is inside them: `dict[str, int] | None` -> {dict, NoneType}."""
    is_union = typing.get_origin(its_type) in (typing.Union, types.UnionType)
    kinds = set()
    for part in typing.get_args(its_type) if is_union else [its_type]:
        origin = typing.get_origin(part)
        kinds |= {type(value) for value in typing.get_args(part)} if origin is typing.Literal else {origin or part}
    return kinds


def check_kind(key: str, value: Any, its_type: Any, least: float | None = None, given: Any = None) -> None:
    """Raises ValueError for a value of a kind that its key does not take: a truth value is no number, nor is text.

    Of a class that is neither number, text, list nor dict, nothing is said: what takes such an object knows better.

    Args:
        key: as the message calls it.
        value: what it has.
        its_type: the type that it should have, as a field is annotated.
        least: a number must be this or more, and finite.
        given: what the message says was given, where `value` was made of it.
    """
    kinds = kinds_of(its_type)
    if _fits(key, value, kinds) and (value is None or least is None or least <= value < math.inf):
        return
    # A whole number is a number, too.
    words = " or ".join(WORDS[kind] for kind in WORDS if kind in kinds and not (kind is int and float in kinds))
    if least is not None:
        words += f" of {least} or more" + (", or None" if type(None) in kinds else "")
    raise ValueError(f"`{key}` is {value if given is None else given!r}; it must be {words}.")


def _fits(key: str, value: Any, kinds: set[Any]) -> bool:
    if not kinds & set(WORDS):
        return True
    if value is None:  # as good as False or not given, but for what is computed with or looked into
        return type(None) in kinds or not kinds & {int, float, dict} or key in _MAY_BE_NONE
    if isinstance(value, bool):
        return bool in kinds
    if isinstance(value, numbers.Integral):
        return bool(kinds & {int, float}) or (bool in kinds and value in (0, 1))
    if isinstance(value, numbers.Real):
        return float in kinds
    for plain, kind in ((str, str), ((list, tuple), list), (dict, dict)):
        if isinstance(value, plain):
            return kind in kinds
    return True
