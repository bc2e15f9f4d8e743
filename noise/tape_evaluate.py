"""Evaluating a function under a recorder."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from voxelsigma.noise.tape_entries import Record
from voxelsigma.noise.tape_places import place
from voxelsigma.noise.tape_record import UNSUPPLIED, Recorder, activated

# what hands on a value without its derivative
_CUTTING = {
    torch.Tensor.detach,
    torch.Tensor.detach_,
    torch.Tensor.data.__get__,  # type: ignore[attr-defined]
    torch.Tensor.numpy,
    torch.Tensor.__array__,
    torch.Tensor.tolist,
    torch.Tensor.data_ptr,
    torch.Tensor.__dlpack__,
}


class _Boundary(TorchFunctionMode):
    """Sees at the level of Python what the recorder below cannot: detached tensors, and values that leave torch."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _CUTTING and self._depends(args[0]):
            name = "detach" if isinstance(result, Tensor) else func.__name__
            self._recorder.record.cut(f"Tensor.{name} in {place()}", detached=True)
            if isinstance(result, Tensor):
                self._recorder.forget(result)
        return result

    def _depends(self, tensor: Any) -> bool:
        return isinstance(tensor, Tensor) and self._recorder.slot_of(tensor) is not None


def record(function: Callable[[Tensor], Tensor], point: Tensor, *, copying: bool) -> tuple[Tensor, Record, int | None]:
    """Evaluate a function once and keep a tape.

    Parameters
    ----------
    function, point
        What to evaluate, and where.
    copying
        Let the tape keep copies of all it refers to.

    Returns
    -------
        The function's value; the record; the number of the value on the tape, None where it is a constant.
    """
    recorder = Recorder(copying=copying)
    # a copy: the function may write into it
    start = point.detach().clone(memory_format=torch.contiguous_format)
    recorder.mark(start)
    with torch.no_grad(), activated(recorder), _Boundary(recorder), recorder:
        value = function(start)
    if not isinstance(value, Tensor):
        raise TypeError(f"linearize: the reconstruction must return one tensor, got {type(value).__name__}")
    if recorder.record.failure is None:
        with torch.no_grad():
            recorder.finish()
    slot = recorder.slot_of(value)
    if slot == UNSUPPLIED:
        recorder.fail("the value is a secondary result")
    return value.detach(), recorder.record, slot
