"""Cyclic shifts taken out of a tape.

Centred Fourier transforms shift coil images and k-space forth and back. Products with constants and sums over coils
let a shift pass if their constants are shifted instead, once: then shifts meet their inverses and vanish, or are left
with one image where there were those of all coils. Shifts took about a tenth of a probe's time.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from voxelsigma.noise.tape_call import Factor, Rule, Scale, Shift
from voxelsigma.noise.tape_entries import Entry, Record
from voxelsigma.noise.tape_rules import scaled


def without_shifts(record: Record, result: int) -> int:
    """Rewrite the entries of a record so that shifts are few and of small tensors.

    Parameters
    ----------
    record
        A complete record; its entries and sizes are changed.
    result
        Number of the value.

    Returns
    -------
        The value's number.
    """
    rewriting = _Rewriting(record, result)
    for entry in record.entries:
        rewriting.take(entry)
    result = rewriting.settled(result)
    record.entries[:] = rewriting.written
    return result


class _Rewriting:
    """Entries as they are rewritten, in order.

    A value may be put off: `late[number] = (other, shift)` says that it is another value, shifted, and is not written.
    """

    def __init__(self, record: Record, result: int) -> None:
        self.written: list[Entry] = []
        self._late: dict[int, tuple[int, Shift]] = {}
        self._makers: dict[int, Entry] = {}
        self._sizes = record.sizes
        self._uses = Counter(number for entry in record.entries for number in entry.inputs)
        self._uses[result] += 1
        self._next = max((number for entry in record.entries for number in (*entry.inputs, *entry.outputs)), default=0)

    def take(self, entry: Entry) -> None:
        """One more entry of the record."""
        rule = entry.rule
        assert rule is not None
        if len(entry.inputs) == 1 and len(entry.outputs) == 1:
            (given,), (made,) = entry.inputs, entry.outputs
            source, shift = self._late.get(given, (given, ()))
            if rule.shift is not None:
                self._late[made] = source, _joined(shift, rule.shift)
                self._uses[source] += self._uses[made] - 1
                return
            passed = _passing(rule, shift) if shift else None
            if passed is not None:
                stored = self._new(made)
                self._uses[stored] = self._uses[made]
                self._put(Entry(entry.name, entry.place, (source,), (stored,), passed))
                self._late[made] = stored, shift
                return
        self._put(replace(entry, inputs=tuple(self.settled(number) for number in entry.inputs)))

    def settled(self, number: int) -> int:
        """Write a value that was put off; the number under which it is found."""
        source, shift = self._late.get(number, (number, ()))
        if not shift:
            return source
        del self._late[number]
        maker = self._makers.get(source)
        passed = None if maker is None else _earlier(maker, shift)
        if maker is None or passed is None:
            self._put(Entry("roll", maker.place if maker else "", (source,), (number,), _shifting(shift)))
            return number
        # the value of before the product is smaller: shift that, and multiply by the shifted constant
        before = self._new(maker.inputs[0])
        self._put(Entry("roll", maker.place, maker.inputs, (before,), _shifting(shift)))
        self._put(Entry(maker.name, maker.place, (before,), (number,), passed))
        return number

    def _put(self, entry: Entry) -> None:
        """Write an entry; a product of a product is one product."""
        assert entry.rule is not None
        if entry.rule.scale is not None:
            maker = self._makers.get(entry.inputs[0])
            if maker is not None and self._uses[entry.inputs[0]] == 1:
                assert maker.rule is not None
                both = _product(maker.rule, entry.rule)
                if both is not None:
                    entry = Entry(entry.name, entry.place, maker.inputs, entry.outputs, both)
        self.written.append(entry)
        if entry.rule is not None and entry.rule.scale is not None:
            self._makers[entry.outputs[0]] = entry

    def _new(self, like: int) -> int:
        self._next += 1
        self._sizes[self._next] = self._sizes.get(like, 0)
        return self._next


def _joined(first: Shift, second: Shift) -> Shift:
    """One shift after another; empty if they cancel."""
    places: dict[tuple[int, int], int] = {}
    for axis, by, length in (*first, *second):
        places[axis, length] = (places.get((axis, length), 0) + by) % max(length, 1)
    return tuple(sorted((axis, by, length) for (axis, length), by in places.items() if by))


def _inverse(shift: Shift) -> Shift:
    return tuple((axis, (-by) % length, length) for axis, by, length in shift)


def _passing(rule: Rule, shift: Shift) -> Rule | None:
    """The rule that does before a shift what this one does after it; None where there is none."""
    axes = {axis for axis, _, _ in shift}
    if rule.scale is not None:
        scale = rule.scale
        if any(-axis > len(scale.before) for axis in axes):
            return None
        return _multiplying(replace(scale, factor=_moved(scale.factor, _inverse(shift))), rule)
    # a sum that leaves its axes out brings those before them nearer to the end
    if rule.sums is not None and rule.sums and max(rule.sums) < min(axes):
        return rule
    return None


def _earlier(maker: Entry, shift: Shift) -> Rule | None:
    """The product with a constant that follows a shift instead of preceding it, where that is cheaper."""
    assert maker.rule is not None
    scale = maker.rule.scale
    if scale is None or any(-axis > len(scale.before) for axis, _, _ in shift):
        return None
    return _passing(maker.rule, _inverse(shift)) if _count(scale.before) < _count(scale.shape) else None


def _product(first: Rule, second: Rule) -> Rule | None:
    """Two products with constants as one, where that is no more work."""
    one, two = first.scale, second.scale
    if one is None or two is None or one.dtype != two.dtype or first.lowering != second.lowering:
        return None
    joined = torch.broadcast_shapes(one.factor.shape, two.factor.shape)
    if _count(joined) > max(one.factor.numel(), two.factor.numel()):
        return None
    return _multiplying(Scale(one.factor * two.factor, one.before, two.shape, two.dtype), second)


def _multiplying(scale: Scale, like: Rule) -> Rule:
    factor = Factor(scale.factor)

    def push(tangents: Sequence[Tensor], free: Sequence[bool]) -> Tensor:
        return scaled(tangents[0], factor, free[0], scale.shape, scale.dtype)

    return replace(like, push=push, scale=scale)


def _shifting(shift: Shift) -> Rule:
    places, axes = [by for _, by, _ in shift], [axis for axis, _, _ in shift]
    return Rule(lambda tangents, free: torch.roll(tangents[0], places, axes))


def _moved(tensor: Tensor, shift: Shift) -> Tensor:
    """A constant shifted along those of its axes that are longer than 1."""
    own = [(axis, by) for axis, by, length in shift if -axis <= tensor.dim() and tensor.shape[axis] == length > 1]
    if not own:
        return tensor
    return torch.roll(tensor, [by for _, by in own], [axis for axis, _ in own])


def _count(shape: Sequence[int]) -> int:
    return int(torch.Size(shape).numel())
