"""Recording one evaluation of a function, operation by operation."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from voxelsigma.noise.tape_call import Call, Dependent, Push, Rule, bind, differentiable, tensors_of
from voxelsigma.noise.tape_entries import Entry, Record
from voxelsigma.noise.tape_memory import (
    Content,
    address,
    fills_memory,
    flat_layout,
    flattening,
    layout_of,
    reading,
    writing,
)
from voxelsigma.noise.tape_places import place
from voxelsigma.noise.tape_rules import at_once, by_forward_mode

_PushGiven: TypeAlias = Callable[[tuple[Tensor | None, ...]], Tensor]
_SLOT = "_voxelsigma_slot"
UNSUPPLIED = -1
_UNKNOWN = -2
_DETACHED = -1
_state = threading.local()

_SHAPE_ONLY = {
    getattr(torch.ops.aten, name)
    for name in ("zeros_like", "ones_like", "empty_like", "full_like", "new_zeros", "new_ones", "new_empty", "new_full")
} | {torch.ops.aten.new_empty_strided, torch.ops.aten.sym_size, torch.ops.aten.sym_stride}
_OVERWRITING = {torch.ops.aten.copy_, torch.ops.aten.zero_, torch.ops.aten.fill_}
# constant almost everywhere
_STEPS = {getattr(torch.ops.aten, name) for name in ("round", "floor", "ceil", "trunc", "sign", "heaviside")}


class Recorder(TorchDispatchMode):
    """Watches aten operations and keeps a tape of those that depend on one tensor.

    Which value a tensor holds is written on the tensor. After a failure the function just runs on.

    Parameters
    ----------
    copying
        Let rules keep copies of all values: for functions that write into constants they have used.
    """

    def __init__(self, *, copying: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.record = Record()
        # stands on tensors in the recorder's place: these may outlive it, and must not keep its tape
        self._token = object()
        self._copying = copying
        # rules by forward mode must wait until nothing is watched any more: the entry's place, and what it needs
        self._waiting: list[tuple[int, Call, str]] = []
        self._count = 0
        self._contents: dict[int, Content] = {}
        # constants that the tape refers to: whoever writes there would change the derivative
        self._held: dict[int, StorageWeakRef] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # torch would import its compiler, a second or two, to keep it away from here
        return False

    def slot_of(self, tensor: Tensor) -> int | None:
        """Number of the value that a tensor holds; None if it does not depend on the input."""
        owner, slot, version = getattr(tensor, _SLOT, (None, None, 0))
        if owner is not self._token:
            slot, version = None, 0
        content = self._contents.get(address(tensor))
        if version == _DETACHED or content is None or content.version == version:
            return slot
        # somebody wrote into its memory since
        slot = self._read(tensor, content)
        setattr(tensor, _SLOT, (self._token, slot, content.version))
        return slot

    def mark(self, tensor: Tensor, slot: int | None = None) -> int:
        """Write a new number on a tensor."""
        slot = self._new() if slot is None else slot
        self.record.sizes[slot] = tensor.numel() * tensor.element_size()
        where = address(tensor)
        content = self._contents.get(where)
        if not where:
            setattr(tensor, _SLOT, (self._token, slot, 0))
            return slot
        if content is None:
            whole = slot >= 0 and fills_memory(tensor)
            memory = StorageWeakRef(tensor.untyped_storage())
            content = Content(slot if whole else _UNKNOWN, layout_of(tensor), 0, memory)
            self._contents[where] = content
        setattr(tensor, _SLOT, (self._token, slot, content.version))
        return slot

    def forget(self, tensor: Tensor) -> None:
        """Make a tensor a constant."""
        setattr(tensor, _SLOT, (self._token, None, _DETACHED))

    def _new(self) -> int:
        self._count += 1
        return self._count - 1

    def _emit(self, name: str, inputs: Sequence[int], rule: Rule) -> int:
        """One more entry, which has no counterpart in the evaluation."""
        slot = self._new()
        self.record.sizes[slot] = max(self.record.sizes[number] for number in inputs)
        self.record.entries.append(Entry(name, place(), tuple(inputs), (slot,), rule))
        return slot

    def _flat(self, tensor: Tensor, content: Content) -> int | None:
        """Number of the value that is all of a tensor's memory as one axis."""
        flat = flat_layout(tensor)
        if content.slot is None or content.layout == flat:
            return content.slot
        if content.slot < 0 or content.layout.dtype != flat.dtype:
            return _UNKNOWN
        slot = self._emit("flatten", [content.slot], flattening(content.layout, flat.size[0]))
        self._contents[address(tensor)] = Content(slot, flat, content.version, content.memory)
        return slot

    def _read(self, tensor: Tensor, content: Content) -> int | None:
        """Number of the value that is seen through a view of memory that was written into."""
        layout = layout_of(tensor)
        if content.slot is None or content.layout == layout:
            return content.slot
        flat = self._flat(tensor, content)
        if flat is None or flat < 0 or tensor.is_conj() or tensor.is_neg():
            self.fail(f"a view in {place()} of a tensor that was written into", writes=True)
            return None
        return self._emit("read", [flat], reading(layout, is_complex=tensor.is_complex()))

    def _written(self, target: Tensor, slot: int | None, *, same_type: bool) -> None:
        """Note what memory holds after a write through a tensor; None for a constant."""
        where, layout = address(target), layout_of(target)
        content = self._contents.get(where)
        if content is None:
            content = Content(None, flat_layout(target), 0, StorageWeakRef(target.untyped_storage()))
        if fills_memory(target) and (same_type or slot is None):
            after = slot
        else:
            flat = self._flat(target, content)
            if flat == _UNKNOWN or target.is_conj() or target.is_neg():
                self.fail(f"a write in {place()} into a tensor that others may see", writes=True)
                return
            inputs = [number for number in (flat, slot) if number is not None]
            count, layout = flat_layout(target).size[0], flat_layout(target)
            rule = writing(layout_of(target), count, before=flat is not None, after=slot is not None)
            after = self._emit("write", inputs, rule) if inputs else None
        self._contents[where] = Content(after, layout, content.version + 1, content.memory)

    def fail(self, reason: str, *, writes: bool = False) -> None:
        """Give up; the first reason counts."""
        if self.record.failure is None:
            self.record.failure, self.record.writes = reason, writes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunction():
            if self.record.failure is not None:
                return func(*args, **kwargs)
            arguments = bind(func, args, kwargs)
            dependents = tuple(self._dependents(arguments))
            if func._schema.is_mutable:
                return self._write(func, args, kwargs, arguments, dependents)
            outputs = func(*args, **kwargs)
            if _is_random(func, arguments):
                self.record.random.append(f"{func} in {place()}")
            if dependents:
                self._note(Call(func, arguments, dependents, tensors_of(outputs)))
            return outputs

    def _dependents(self, arguments: dict[str, Any]) -> Iterator[Dependent]:
        for name, value in arguments.items():
            if isinstance(value, Tensor):
                if self.slot_of(value) is not None:
                    yield Dependent(name, None, value)
            elif isinstance(value, (list, tuple)):
                for index, item in enumerate(value):
                    if isinstance(item, Tensor) and self.slot_of(item) is not None:
                        yield Dependent(name, index, item)

    def _note(self, call: Call) -> None:
        """Put an operation on the tape."""
        if call.func.overloadpacket in _SHAPE_ONLY:
            return
        outputs = [tensor for tensor in call.outputs if differentiable(tensor)]
        if (
            call.func.overloadpacket in _STEPS
            or not outputs
            or not all(differentiable(dependent.primal) for dependent in call.dependents)
        ):
            handed_on = call.func.overloadpacket is torch.ops.aten._local_scalar_dense
            self.record.cut(f"{call.func} in {place()}", detached=handed_on)
            return
        if _is_random(call.func, call.arguments):
            self.fail(f"{call.func} in {place()} is random")
            return
        inputs = tuple(self.slot_of(dependent.primal) for dependent in call.dependents)
        if UNSUPPLIED in inputs:
            self.fail(f"{call.func} in {place()} uses a secondary result")
            return
        if self._copying:
            call = call.copied()
        else:
            self._hold(call)
        rule = at_once(call)
        slots = tuple(self._marks(outputs, None if rule is None else rule.supplies))
        entry = Entry(str(call.func), place(), inputs, slots, rule)  # type: ignore[arg-type]
        if rule is None:
            self._waiting.append((len(self.record.entries), call.copied(), place()))
        self.record.entries.append(entry)

    def _hold(self, call: Call) -> None:
        own = {address(dependent.primal) for dependent in call.dependents}
        for value in call.arguments.values():
            for tensor in tensors_of(value):
                where = address(tensor)
                if where and where not in own and where not in self._held:
                    self._held[where] = StorageWeakRef(tensor.untyped_storage())

    def implicit(
        self,
        name: str,
        inputs: Sequence[Tensor],
        solve: Callable[..., Tensor],
        rule: Callable[[Sequence[Tensor], Tensor], _PushGiven],
    ) -> Tensor:
        """Evaluate an opaque function unseen, and put it on the tape as one entry."""
        with _unwatched():
            value = solve(*inputs)
        # a tensor of its own: a function that hands on its input would take its number away
        value = value.detach().clone() if self.slot_of(value) is not None else value
        slots = [self.slot_of(tensor) for tensor in inputs]
        dependents = [slot for slot in slots if slot is not None]
        if self.record.failure is None and dependents:
            if UNSUPPLIED in dependents:
                self.fail(f"{name} in {place()} uses a secondary result")
                return value
            # its rule may keep what it is given
            inputs = [tensor.detach().clone() for tensor in inputs]
            present = [slot is not None for slot in slots]
            with _unwatched():
                push = rule(inputs, value.clone())
            self.record.entries.append(
                Entry(name, place(), tuple(dependents), (self.mark(value),), Rule(_spread(push, present), view=True))
            )
        return value

    def _marks(self, outputs: Sequence[Tensor], supplied: int | None) -> Iterator[int]:
        supplied = len(outputs) if supplied is None else supplied
        for tensor in outputs[:supplied]:
            yield self.mark(tensor)
        for tensor in outputs[supplied:]:
            self.mark(tensor, UNSUPPLIED)

    def finish(self) -> None:
        """Find the rules that had to wait."""
        for position, call, where in self._waiting:
            try:
                rule = by_forward_mode(call)
            except NotImplementedError as error:
                reason = str(error).splitlines()[0] if str(error) else "no rule"
                self.fail(f"{call.func} in {where} has no forward derivative ({reason})")
                return
            self.record.entries[position].rule = rule
        self._waiting.clear()

    def _write(self, func: Any, args: Any, kwargs: Any, arguments: dict[str, Any], dependents: Any) -> Any:
        """An operation that writes into some of its arguments."""
        written = [argument.name for argument in func._schema.arguments if argument.is_write]
        touched = {address(tensor) for name in written for tensor in tensors_of(arguments[name])}
        if touched & self._held.keys():
            self.fail(f"{func} in {place()} writes into a constant that was used before", writes=True)
        if _is_random(func, arguments):
            self.record.random.append(f"{func} in {place()}")
        if not dependents and not any(self._holds(where) for where in touched):
            return func(*args, **kwargs)
        target, plain = arguments.get("self"), _without_writing(func)
        if not isinstance(target, Tensor) or written != ["self"] or plain is None:
            self.fail(f"{func} in {place()} writes into a tensor that others may see", writes=True)
        if self.record.failure is not None:
            return func(*args, **kwargs)
        assert isinstance(target, Tensor)
        if func.overloadpacket in _OVERWRITING:
            dependents = tuple(dependent for dependent in dependents if dependent.name != "self")
        # what the operation would give if it did not write
        result = plain(*args, **kwargs)
        slot = None
        if dependents:
            arguments = bind(plain, args, kwargs)
            if not any(dependent.name == "self" for dependent in dependents):
                arguments["self"] = target.clone()
            self._note(Call(plain, arguments, dependents, (result,)))
            slot = self.slot_of(result)
        target.copy_(result)
        self._written(target, slot, same_type=result.dtype == target.dtype and result.shape == target.shape)
        return target

    def _holds(self, where: int) -> bool:
        """Whether memory holds something that depends on the input."""
        content = self._contents.get(where)
        return content is not None and content.slot is not None


def _spread(push: _PushGiven, present: Sequence[bool]) -> Push:
    """A rule on the tangents of all inputs, from those of the dependent ones."""

    def spread(tangents: Sequence[Tensor], free: Sequence[bool]) -> Tensor:
        given = iter(tangents)
        return push(tuple(next(given) if there else None for there in present))

    return spread


@contextmanager
def _unwatched() -> Iterator[None]:
    """No recorder: what happens here is nobody's business."""
    with activated(None), torch.utils._python_dispatch._disable_current_modes(), torch._C.DisableTorchFunction():
        yield


def active_recorder() -> Recorder | None:
    """The recorder that watches this thread, if any."""
    return getattr(_state, "recorder", None)


@contextmanager
def activated(recorder: Recorder | None) -> Iterator[None]:
    """Let a recorder watch this thread, or none."""
    before = active_recorder()
    _state.recorder = recorder
    try:
        yield
    finally:
        _state.recorder = before


def _without_writing(func: Any) -> Any:
    """The operation that gives as a new tensor what an in-place one writes, None if there is none."""
    name = func._schema.name.split("::")[-1]
    if not name.endswith("_") or name.endswith("__"):
        return None
    packet = getattr(torch.ops.aten, name[:-1], None)
    overload = func._overloadname
    return getattr(packet, overload, None) if packet is not None and overload in packet.overloads() else None


def _is_random(func: Any, arguments: dict[str, Any]) -> bool:
    """Whether an operation draws random numbers, as it was called."""
    idle = arguments.get("dropout_p") == 0 or arguments.get("train") is False
    return torch.Tag.nondeterministic_seeded in func.tags and not idle
