"""Where in the caller's code an operation comes from."""

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from voxelsigma.noise.tape_call import differentiable, tensors_of

_OURS = tuple(f"noise/{name}.py" for name in ("tape_record", "tape_evaluate", "tape_places", "tape", "linearize"))


def place() -> str:
    """Where in the caller's code this is: function, file, line, and the innermost module that is at work."""
    frame: FrameType | None = sys._getframe(1)
    spot: str | None = None
    while frame is not None:
        code = frame.f_code
        if spot is None and not code.co_filename.endswith(_OURS) and "/torch/" not in code.co_filename:
            spot = f"{code.co_name} ({code.co_filename.rsplit('/', 1)[-1]}:{frame.f_lineno})"
        owner = frame.f_locals.get("self") if code.co_name == "forward" else None
        if isinstance(owner, nn.Module):
            return f"module {type(owner).__name__}, {spot or 'code unknown'}"
        frame = frame.f_back
    return spot or "code unknown"


class _NonFinite(TorchDispatchMode):
    """Remembers the first operation with a non-finite result of finite arguments."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: str | None = None

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        made = not str(func).startswith("aten.empty") and not all(map(_finite, tensors_of(outputs)))
        if self.found is None and made and all(map(_finite, tensors_of(args))):
            self.found = f"{func} in {place()}"
        return outputs


def first_non_finite(function: Callable[[Tensor], Tensor], point: Tensor) -> str:
    """Name the operation, and the module, that first gives a non-finite result of finite arguments."""
    mode = _NonFinite()
    with torch.no_grad(), mode:
        function(point)
    return mode.found or "code unknown"


def _finite(tensor: Tensor) -> bool:
    return not differentiable(tensor) or bool(tensor.isfinite().all())
