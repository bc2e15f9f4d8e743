"""Whether CUDA devices multiply float32 in TF32."""

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

# switches are global: who sets them while another has them set would restore the wrong ones
_switches = threading.RLock()


@contextmanager
def tensor_cores(allowed: bool) -> Iterator[None]:
    """Multiply float32 in TF32 on CUDA devices, or do not, whatever the process says; restored even after errors.

    torch's switches belong to the process, and its stock setting is TF32 for convolutions. A lock keeps two threads
    apart that use this function; others that launch work meanwhile, without holding the device, are not kept apart.
    """
    with _switches:
        before = _Switches.read()
        try:
            _Switches.all(allowed).write()
            yield
        finally:
            before.write()


@dataclass(frozen=True, slots=True)
class _Switches:
    """State of torch's switches, old and new style; None where a style is not there or was not used alone."""

    old: tuple[bool, bool] | None
    new: tuple[str, ...] | None

    @staticmethod
    def all(allowed: bool) -> "_Switches":
        try:
            _read_old()
            old = (allowed, allowed)
        except RuntimeError:
            # the process uses the new style, and reading the old one is refused
            old = None
        return _Switches(old, tuple("tf32" if allowed else "ieee" for _ in _new_style()) or None)

    @staticmethod
    def read() -> "_Switches":
        try:
            old = _read_old()
        except RuntimeError:
            old = None
        return _Switches(old, tuple(item.fp32_precision for item in _new_style()) or None)

    def write(self) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*new API settings to control TF32")
            if self.old is not None:
                torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = self.old
            # afterwards: the old style sets these too
            for item, value in zip(_new_style(), self.new or (), strict=bool(self.new)):
                item.fp32_precision = value


def _read_old() -> tuple[bool, bool]:
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


def _new_style() -> tuple[Any, ...]:
    """Objects with a switch in the style of torch 2.9, none before."""
    cudnn: Any = torch.backends.cudnn
    if not hasattr(cudnn, "conv"):
        return ()
    return torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn
