"""Work spread over threads."""

from __future__ import annotations

import threading

import pytest

from stpath_runtime.encoding.threads import each


@pytest.mark.parametrize("at_once", [1, 2, 5])
def test_results_come_in_order(at_once):
    assert list(each(lambda item: item * item, range(20), at_once)) == [item * item for item in range(20)]


def test_items_run_at_once():
    both = threading.Barrier(2, timeout=10)  # which one thread alone would wait for in vain
    assert len(list(each(lambda _: both.wait(), range(2), 2))) == 2


@pytest.mark.parametrize("at_once", [1, 2])
def test_after_an_error_none_begins(at_once):
    begun = []

    def work(item):
        begun.append(item)
        if item == 0:
            raise ValueError("the first")
        threading.Event().wait(0.05)

    with pytest.raises(ValueError, match="the first"):
        list(each(work, range(100), at_once))
    assert len(begun) < 10
