"""Work that leaves later than the image it belongs to."""

import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import CancelledError
from typing import Any

import pytest

from voxelsigma.gadgets.afterwork import Stop, with_afterwork

SECONDS = 20


def test_what_leaves_at_once_does_not_wait_for_tasks() -> None:
    gate = threading.Event()

    def sort(item: int) -> tuple[list[str], Any]:
        def task(stop: Stop) -> Iterator[str]:
            assert gate.wait(SECONDS)
            yield f"map {item}"

        return [f"image {item}"], task

    stream = with_afterwork(iter(range(3)), sort)
    assert [next(stream) for _ in range(3)] == ["image 0", "image 1", "image 2"]
    gate.set()
    assert list(stream) == ["map 0", "map 1", "map 2"]


def test_results_leave_with_the_next_item() -> None:
    done = threading.Event()

    def items() -> Iterator[str]:
        yield "first"
        assert done.wait(SECONDS)
        while threading.active_count() and not finished.is_set():
            pass
        yield "second"

    finished = threading.Event()

    def task(stop: Stop) -> Iterable[str]:
        done.set()
        yield "map"
        finished.set()

    found = list(with_afterwork(items(), lambda item: ([item], task if item == "first" else None)))
    assert sorted(found) == ["first", "map", "second"]
    assert found[0] == "first"


def test_a_task_that_fails_ends_the_stream_and_no_further_one_begins() -> None:
    begun: list[int] = []

    def sort(item: int) -> tuple[list[int], Any]:
        def task(stop: Stop) -> Iterable[int]:
            begun.append(item)
            raise ValueError(f"task {item}")

        return [item], task if item == 0 else None

    with pytest.raises(ValueError, match="task 0"):
        list(with_afterwork(iter(range(3)), sort))
    assert begun == [0]


def test_a_stream_that_fails_stops_its_task_between_two_steps() -> None:
    running, stopped = threading.Event(), threading.Event()

    def items() -> Iterator[int]:
        yield 0
        assert running.wait(SECONDS)
        raise ValueError("upstream")

    def task(stop: Stop) -> Iterable[int]:
        running.set()
        try:
            while True:
                stop()
        except CancelledError:
            stopped.set()
            raise
        yield 1

    with pytest.raises(ValueError, match="upstream"):
        list(with_afterwork(items(), lambda item: ([], task)))
    assert stopped.is_set()


def test_a_stream_that_is_closed_leaves_no_thread() -> None:
    before = threading.active_count()

    def task(stop: Stop) -> Iterable[int]:
        while True:
            stop()
        yield 1

    stream = with_afterwork(iter(range(3)), lambda item: ([item], task))
    assert next(stream) == 0
    assert next(stream) == 1
    stream.close()  # type: ignore[attr-defined]  # a generator
    assert threading.active_count() == before
