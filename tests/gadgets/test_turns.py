"""Turns on a device: one at a time, first come first served."""

import itertools
import threading
import time
from collections.abc import Callable

import pytest

from voxelsigma.gadgets.turns import Turns

SECONDS = 20.0


def eventually(what: Callable[[], bool]) -> bool:
    end = time.monotonic() + SECONDS
    while not what() and time.monotonic() < end:
        time.sleep(0.001)
    return what()


def waiting(turns: Turns) -> int:
    return len(turns._waiting)


def started(work: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def test_turns_come_in_the_order_of_asking() -> None:
    turns, order = Turns(), list[int]()

    def work(number: int) -> None:
        with turns():
            order.append(number)

    threads = []
    with turns():
        for number in range(10):
            threads.append(started(lambda number=number: work(number)))  # type: ignore[misc]
            assert eventually(lambda number=number: waiting(turns) == number + 1)  # type: ignore[misc]
        assert order == []
    for thread in threads:
        thread.join(SECONDS)
    assert order == list(range(10))


def test_whoever_asks_again_stands_at_the_end() -> None:
    """A greedy scan cannot keep another waiting for more than one turn."""
    turns, order = Turns(), list[str]()

    def work(name: str) -> None:
        for _ in range(20):
            with turns():
                order.append(name)
                # holds on until the other one asks, as long as there is one
                eventually(lambda: waiting(turns) > 0 or not all(thread.is_alive() for thread in threads))

    threads = []
    with turns():
        threads += [started(lambda name=name: work(name)) for name in "ab"]  # type: ignore[misc]
        assert eventually(lambda: waiting(turns) == 2)
    for thread in threads:
        thread.join(SECONDS)
    assert sorted(order) == ["a"] * 20 + ["b"] * 20
    assert all(first != second for first, second in itertools.pairwise(order))


def test_one_at_a_time() -> None:
    turns, inside, most = Turns(), 0, 0

    def work() -> None:
        nonlocal inside, most
        for _ in range(200):
            with turns():
                inside += 1
                most = max(most, inside)
                inside -= 1

    threads = [started(work) for _ in range(8)]
    for thread in threads:
        thread.join(SECONDS)
        assert not thread.is_alive()
    assert (most, inside, waiting(turns)) == (1, 0, 0)


def test_a_failure_gives_the_turn_back() -> None:
    turns = Turns()
    with pytest.raises(LookupError, match="oh"), turns():
        raise LookupError("oh")
    with turns():
        pass


@pytest.mark.parametrize("called", [False, True])
def test_an_interrupted_wait_holds_nobody_up(monkeypatch: pytest.MonkeyPatch, called: bool) -> None:
    """Interrupted while it waits, or just when its turn has come."""
    turns = Turns()

    class Interrupted(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            if called:
                first.__exit__(None, None, None)
            raise KeyboardInterrupt

    first = turns()
    first.__enter__()
    with monkeypatch.context() as patch:
        patch.setattr(threading, "Event", Interrupted)
        with pytest.raises(KeyboardInterrupt), turns():
            pytest.fail("a turn without waiting")
    assert waiting(turns) == 0
    if not called:
        first.__exit__(None, None, None)
    done = started(lambda: turns().__enter__())
    done.join(SECONDS)
    assert not done.is_alive()
