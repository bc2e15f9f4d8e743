"""TF32 switched for a while: set, nested, restored."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from voxelsigma.noise.tensor_cores import tensor_cores

STOCK_OLD, STOCK_NEW = (False, True), ("none", "tf32", "tf32")


def new_style() -> tuple[Any, ...]:
    cudnn: Any = torch.backends.cudnn
    return (torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn) if hasattr(cudnn, "conv") else ()


def switches() -> tuple[object, ...]:
    """All that the process says about TF32."""
    try:
        old: object = (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)
    except RuntimeError:
        old = "mixed"
    return old, *(item.fp32_precision for item in new_style())


@pytest.fixture(autouse=True)
def _stock() -> Iterator[None]:
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = STOCK_OLD
    for item, value in zip(new_style(), STOCK_NEW, strict=False):
        item.fp32_precision = value


def use_old() -> None:
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = True, False


def use_new() -> None:
    for item, value in zip(new_style(), ("tf32", "ieee", "tf32"), strict=False):
        item.fp32_precision = value


@pytest.mark.parametrize("prepare", [lambda: None, use_old, use_new], ids=["stock", "old style", "new style"])
@pytest.mark.parametrize("allowed", [True, False])
def test_switches_are_set_and_restored(prepare: Callable[[], None], allowed: bool) -> None:
    prepare()
    before = switches()
    with tensor_cores(allowed):
        inside = switches()
        with tensor_cores(not allowed):
            assert switches() != inside
        assert switches() == inside
    assert switches() == before
    assert inside[0] in ((allowed, allowed), "mixed")
    assert all(value == ("tf32" if allowed else "ieee") for value in inside[1:])
    with pytest.raises(KeyboardInterrupt), tensor_cores(allowed):
        raise KeyboardInterrupt
    assert switches() == before


def test_threads_restore_what_was() -> None:
    """Without the lock one of two overlapping threads would restore what the other had set."""
    before = switches()
    inside, overlapped = threading.Event(), threading.Event()

    def first() -> None:
        with tensor_cores(True):
            inside.set()
            overlapped.wait(0.2)

    def second() -> None:
        inside.wait(10)
        with tensor_cores(True):
            overlapped.set()

    threads = [threading.Thread(target=work, daemon=True) for work in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert overlapped.is_set()
    assert switches() == before
