"""Products, quotients and broadcasts of sizes, against numbers."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distfit.partition import layouts
from distfit.partition.layouts import ROWS, Size, Sizes, by_rows, product, quotient

NAMES = ("rows", "a", "b")
several = settings(deadline=None, max_examples=200)
sizes = st.builds(
    lambda factor, symbols: product([factor, *(Size(1, (s,)) for s in symbols)]),
    st.integers(0, 6),
    st.lists(st.sampled_from(NAMES), max_size=3),
)
numbers = st.fixed_dictionaries({name: st.integers(1, 5) for name in NAMES})


def number(dim, values):
    """The value of a size, given the values of its symbols."""
    if not isinstance(dim, Size):
        return dim
    return dim.factor * int(np.prod([values[s] for s in dim.symbols]))


@several
@given(st.lists(sizes, max_size=4), numbers)
def test_a_product_is_that_of_the_numbers(dims, values):
    expected = int(np.prod([number(d, values) for d in dims], dtype=int))
    assert number(product(dims), values) == expected


@several
@given(sizes, sizes, numbers)
def test_a_quotient_is_exact_where_there_is_one(a, b, values):
    result = quotient(a, b)
    if result is not None:
        assert number(result, values) * number(b, values) == number(a, values)
    if b != 0:
        assert quotient(product([a, b]), b) == a or a == 0


def test_no_quotient_is_guessed():
    assert quotient(ROWS, 2) is None
    assert quotient(6, ROWS) is None
    assert quotient(ROWS, layouts.unknown()) is None
    assert quotient(ROWS, 0) is None
    assert quotient(product([6, ROWS]), product([2, ROWS])) == 3
    assert quotient(product([-1, ROWS]), ROWS) == -1


@several
@given(st.lists(st.lists(sizes, max_size=3), min_size=1, max_size=3), numbers)
def test_a_broadcast_is_that_of_the_numbers(shapes, values):
    known = [[number(d, values) for d in shape] for shape in shapes]
    try:
        expected = np.broadcast_shapes(*known)
    except ValueError:
        return  # One device refuses it.
    for got, want in zip(Sizes().broadcast(shapes), expected, strict=True):
        if not isinstance(got, Size) or set(got.symbols) <= set(NAMES):
            assert number(got, values) == want


@several
@given(sizes, sizes, numbers)
def test_sizes_are_the_same_only_if_the_numbers_are(a, b, values):
    if Sizes().same(a, b):
        assert number(a, values) == number(b, values)
    fixed = Sizes(values["rows"])
    if fixed.same(a, b):
        assert number(a, values) == number(b, values)
    if Sizes().is_one(a) or fixed.is_one(a):
        assert number(a, values) == 1
    assert number(fixed.number(a), values) == number(a, values)


def test_unknown_sizes_equal_nothing_else():
    a, b = layouts.unknown(), layouts.unknown()
    assert not Sizes().same(a, b)
    assert Sizes().same(a, a)
    assert not Sizes().is_one(a)
    assert Sizes().broadcast([[a], [ROWS]])[0] not in (a, ROWS)
    assert Sizes().broadcast([[a], [1]]) == [a]
    assert Sizes().broadcast([[a], [5]]) == [5]


def test_open_rows_are_no_number_and_fixed_rows_are():
    assert not Sizes().same(ROWS, 4)
    assert Sizes(4).same(ROWS, 4)
    assert Sizes(1).is_one(ROWS)
    assert not Sizes().is_one(ROWS)


@pytest.mark.parametrize("blocks, inner", [(1, 1), (2, 1), (1, 3), (2, ROWS)])
def test_the_size_of_a_layout(blocks, inner):
    layout = by_rows(1, blocks, inner)
    assert layout.size == product([blocks, ROWS, inner])
    assert layout.moved(0) == by_rows(0, blocks, inner)
