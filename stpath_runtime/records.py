"""Records of JSON files, checked: every field is present and of its type, and there are no others."""

from __future__ import annotations

import math
from dataclasses import MISSING, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")
NAMES = {
    str: "text",
    int: "a whole number",
    float: "a finite number",
    bool: "true or false",
    NoneType: "null",
    dict: "an object",
    list: "a list",
    tuple: "a list",
}


def record(cls: type[T], json: object, name: str = "") -> T:
    """Make a dataclass of parsed JSON, and check each value against the type of its field.

    Fields may be text, numbers, booleans, None, lists and tuples of one type, dictionaries by text, unions of these,
    `Any`, and dataclasses. A whole number is also a number; true and false are not; NaN and infinity are refused.

    Parameters
    ----------
    json
        What `json.loads` gave.
    name
        What messages call the record: "rows[3]". Empty: a field is called by its own name alone.

    Raises
    ------
    ValueError
        If a field is missing, unknown or of another type; the message names it, what it is and what it has to be.

    Examples
    --------
    >>> from dataclasses import dataclass
    >>> @dataclass
    ... class Spot:
    ...     barcode: str
    ...     counts: int = 0
    >>> record(Spot, {"barcode": "AAAC-1"})
    Spot(barcode='AAAC-1', counts=0)
    >>> record(Spot, {"barcode": "AAAC-1", "counts": "many"}, "spot")
    Traceback (most recent call last):
    ValueError: spot.counts is 'many', not a whole number
    """
    if not isinstance(json, dict):
        raise ValueError(f"{name or 'it'} is {_shown(json)}, not an object")
    types = get_type_hints(cls)
    known = {field.name: field for field in fields(cls) if field.init}  # type: ignore[arg-type]
    if unknown := [key for key in json if key not in known]:
        raise ValueError(f"{_inner(name, unknown[0])} is not a field that this version knows")
    for field in known.values():
        if field.name not in json and field.default is MISSING and field.default_factory is MISSING:
            raise ValueError(f"{_inner(name, field.name)} is missing")
    return cls(**{key: _value(types[key], value, _inner(name, key)) for key, value in json.items()})


def _value(type_: Any, json: object, name: str) -> Any:
    """A value of a type, from JSON."""
    if type_ is Any:
        return json
    if is_dataclass(type_):
        return record(type_, json, name)  # type: ignore[arg-type]
    origin, inner = get_origin(type_) or type_, get_args(type_)
    if origin in (Union, UnionType):
        [type_] = [one for one in inner if (one is NoneType) == (json is None)] or inner[:1]
        return _value(type_, json, name)
    if not _is(origin, json):
        raise ValueError(f"{name} is {_shown(json)}, not {NAMES[origin]}")
    if isinstance(json, dict) and inner:
        return {key: _value(inner[1], value, f"{name}[{key!r}]") for key, value in json.items()}
    if isinstance(json, list) and inner:
        return origin(_value(inner[0], value, f"{name}[{index}]") for index, value in enumerate(json))
    return json


def _is(type_: type, json: object) -> bool:
    """Whether JSON has a value of a plain type."""
    if type_ is float:
        return isinstance(json, int | float) and not isinstance(json, bool) and math.isfinite(json)
    if type_ is int:
        return isinstance(json, int) and not isinstance(json, bool)
    return isinstance(json, list if type_ is tuple else type_)


def _inner(name: str, field: str) -> str:
    return f"{name}.{field}" if name else field


def _shown(json: object, width: int = 40) -> str:
    text = repr(json)
    return text if len(text) <= width else f"{text[:width]}…"
