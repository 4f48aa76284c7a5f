"""Pieces of work side by side: their order, how far ahead they run, and what is left when one fails."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from mm_edge.errors import ModelError
from mm_edge.runtime import FATAL, MOST, cores, in_order, open_session


class Counted:
    """The numbers below `count`, and how many of them were asked for."""

    def __init__(self, count: int) -> None:
        self.count, self.asked = count, 0

    def __iter__(self) -> Iterator[int]:
        for number in range(self.count):
            self.asked += 1
            yield number


def test_results_come_in_the_order_of_the_items_though_a_later_one_is_done_first() -> None:
    later = threading.Event()

    def work(number: int) -> int:
        if number == 0:
            assert later.wait(20), "the second was not run beside the first"
        if number == 1:
            later.set()
        return 10 * number

    assert list(in_order(work, range(9), 2)) == [10 * number for number in range(9)]


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("count", [0, 1, 5, 20])
def test_every_item_is_done_once_and_few_wait(workers: int, count: int) -> None:
    items = Counted(count)
    done: list[int] = []

    def work(item: int) -> int:
        done.append(item)
        return item

    for number, result in enumerate(in_order(work, items, workers)):
        assert result == number
        waiting = items.asked - (number + 1)
        assert waiting <= (0 if workers == 1 else workers)
    assert sorted(done) == list(range(count))


def test_one_worker_is_the_caller() -> None:
    threads = set(in_order(lambda item: threading.current_thread(), range(3), 1))
    assert threads == {threading.current_thread()}
    assert threading.current_thread() not in set(in_order(lambda item: threading.current_thread(), range(3), 2))


@pytest.mark.parametrize("workers", [1, 2])
def test_what_work_raises_comes_where_its_result_would_have(workers: int) -> None:
    items = Counted(50)
    found: list[int] = []

    def work(number: int) -> int:
        if number == 3:
            raise ValueError("number three")
        return number

    with pytest.raises(ValueError, match="number three"):
        for result in in_order(work, items, workers):
            found.append(result)
    assert found == [0, 1, 2]
    assert items.asked <= 4 + workers


def test_what_the_items_raise_is_raised_and_no_thread_stays() -> None:
    def items() -> Iterator[int]:
        yield from range(3)
        raise OSError("no more images")

    before = threading.active_count()
    with pytest.raises(OSError, match="no more images"):
        list(in_order(lambda item: item, items(), 2))
    assert threading.active_count() == before


def test_left_early_nothing_more_is_started_and_no_thread_stays() -> None:
    before = threading.active_count()
    started: list[int] = []

    def work(item: int) -> int:
        started.append(item)
        return item

    results = in_order(work, iter(range(1000)), 2)
    assert isinstance(results, Generator)
    assert next(results) == 0
    results.close()
    assert threading.active_count() == before
    assert len(started) <= 5


def test_cores_are_those_this_process_may_use() -> None:
    assert 1 <= cores() <= MOST


def test_a_model_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"not a model")
    with pytest.raises(ModelError) as caught:
        open_session(path, severity=FATAL)
    assert str(caught.value).startswith(f"ONNX Runtime cannot load '{path}': ")
    with pytest.raises(ModelError) as caught:
        open_session(b"not a model", severity=FATAL)
    assert str(caught.value).startswith("ONNX Runtime cannot load the model: ")
    assert "\n" not in str(caught.value)
