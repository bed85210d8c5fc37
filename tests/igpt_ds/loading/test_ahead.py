"""What is made ahead: the same items in the same order, one of them early; its errors where it is wanted."""

import threading
from collections.abc import Iterator

import pytest

from igpt_ds.loading.ahead import ahead


def test_the_next_item_is_made_while_the_last_one_is_in_use() -> None:
    made = [threading.Event() for _ in range(4)]

    def items() -> Iterator[int]:
        for number, event in enumerate(made):
            event.set()
            yield number

    found = ahead(items())
    assert not made[0].is_set()
    for number in range(3):
        assert next(found) == number
        assert made[number + 1].wait(20)
        assert number > 1 or not made[number + 2].is_set(), "one at most is waiting"
    assert list(found) == [3]


def test_an_error_is_raised_where_its_item_is_wanted() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("the second")

    found = ahead(items())
    assert next(found) == 1
    with pytest.raises(ValueError, match="the second"):
        next(found)


def test_what_is_left_is_not_made() -> None:
    made = []

    def items() -> Iterator[int]:
        for number in range(100):
            made.append(number)
            yield number

    found = ahead(items())
    next(found)
    found.close()  # type: ignore[attr-defined]
    assert len(made) <= 2
