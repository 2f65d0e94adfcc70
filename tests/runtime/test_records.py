from dataclasses import asdict, dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stpath_runtime.records import record


@dataclass(frozen=True)
class Inner:
    name: str
    size: int = 1


@dataclass(frozen=True)
class Outer:
    inner: Inner
    many: tuple[Inner, ...] = ()
    numbers: dict[str, float] = field(default_factory=dict)
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    maybe: int | None = None
    true: bool = False
    anything: Any = None


inners = st.builds(Inner, st.text(), st.integers())
outers = st.builds(
    Outer,
    inners,
    st.lists(inners).map(tuple),
    st.dictionaries(st.text(), st.floats(allow_nan=False, allow_infinity=False) | st.integers()),
    st.lists(st.lists(st.integers()).map(tuple)),
    st.none() | st.integers(),
    st.booleans(),
)


def as_json(value):
    """Tuples as the lists that JSON makes of them."""
    if isinstance(value, dict):
        return {key: as_json(inner) for key, inner in value.items()}
    return [as_json(inner) for inner in value] if isinstance(value, list | tuple) else value


@given(outers)
def test_what_was_written_comes_back(outer):
    assert record(Outer, as_json(asdict(outer))) == outer


@pytest.mark.parametrize(
    ("json", "message"),
    [
        ([], r"it is \[\], not an object"),
        ({}, "inner is missing"),
        ({"inner": 1}, "inner is 1, not an object"),
        ({"inner": {}}, "inner.name is missing"),
        ({"inner": {"name": 1}}, "inner.name is 1, not text"),
        ({"inner": {"name": "a", "size": True}}, "inner.size is True, not a whole number"),
        ({"inner": {"name": "a", "size": 1.0}}, "inner.size is 1.0, not a whole number"),
        ({"inner": {"name": "a", "sise": 1}}, "inner.sise is not a field"),
        ({"inner": {"name": "a"}, "many": [{"name": "b"}, None]}, r"many\[1\] is None, not an object"),
        ({"inner": {"name": "a"}, "numbers": {"x": "1"}}, r"numbers\['x'\] is '1', not a finite number"),
        ({"inner": {"name": "a"}, "numbers": {"x": float("inf")}}, "is inf, not a finite number"),
        ({"inner": {"name": "a"}, "numbers": {"x": True}}, "is True, not a finite number"),
        ({"inner": {"name": "a"}, "shapes": [[1], ["2"]]}, r"shapes\[1\]\[0\] is '2', not a whole number"),
        ({"inner": {"name": "a"}, "maybe": "1"}, "maybe is '1', not a whole number"),
        ({"inner": {"name": "a"}, "true": 1}, "true is 1, not true or false"),
        ({"inner": {"name": "x" * 99}, "true": None}, "true is None, not true or false"),
    ],
)
def test_what_does_not_fit_is_named(json, message):
    with pytest.raises(ValueError, match=message):
        record(Outer, json)


def test_a_long_value_is_cut():
    with pytest.raises(ValueError, match="x…, not an object") as error:
        record(Outer, "x" * 1000, "the file")
    assert len(str(error.value)) < 80
