"""Work that may come later than what a gadget passes on at once: an image must not wait for the maps of another."""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import TypeAlias

from voxelsigma.gadgets.items import Item, Stream

Stop: TypeAlias = Callable[[], None]
"""Raises if the work is not wanted any more; called between its steps."""

Task: TypeAlias = Callable[[Stop], Iterable[Item]]


def with_afterwork(items: Stream, sort: Callable[[Item], tuple[Iterable[Item], Task | None]]) -> Stream:
    """Items in; what is to leave at once, and what tasks have made meanwhile, out.

    Tasks run one after the other on a thread of their own, so their results leave in their order; where one fails, no
    further one begins.

    Parameters
    ----------
    items
        The stream.
    sort
        For an item, what leaves at once and what remains to do.

    Raises
    ------
    Exception
        What a task raises.
    """
    cancelled = threading.Event()

    def stop() -> None:
        if cancelled.is_set():
            raise CancelledError

    waiting: deque[Future[list[Item]]] = deque()
    with ThreadPoolExecutor(1, thread_name_prefix="afterwork") as executor:
        try:
            for item in items:
                now, task = sort(item)
                yield from now
                if task is not None:
                    waiting.append(executor.submit(_done, task, stop))
                while waiting and waiting[0].done():
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        finally:
            cancelled.set()
            executor.shutdown(wait=True, cancel_futures=True)


def _done(task: Task, stop: Stop) -> list[Item]:
    stop()
    found: Iterator[Item] = iter(task(stop))
    return list(found)
