"""Frozen-mask linearization: one evaluation recorded, its derivative replayed on batches of tangents."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# they register their rules
from voxelsigma.noise import tape_convolution, tape_elementwise, tape_functions, tape_networks, tape_shapes  # noqa: F401
from voxelsigma.noise.tape_call import Rule
from voxelsigma.noise.tape_entries import Entry, Record
from voxelsigma.noise.tape_evaluate import record
from voxelsigma.noise.tape_lowering import prepared, raised
from voxelsigma.noise.tape_shifts import without_shifts

NOBODYS = -1


@dataclass(frozen=True, slots=True)
class Step:
    """One operation of the replay.

    Parameters
    ----------
    name, place, rule
        Of the operation.
    inputs, outputs
        Numbers of the values it takes and gives; `NOBODYS` for one that is not needed.
    free
        Which input tangents it may overwrite.
    done
        Values that nobody needs afterwards.
    """

    name: str
    place: str
    rule: Rule
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    free: tuple[bool, ...]
    done: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Tape:
    """The derivative of a function at one point, as a list of operations on tangents.

    Parameters
    ----------
    value
        The function's value there, of the evaluation that was recorded.
    steps
        What the value needs, in order; empty where it is a constant.
    result
        Number of the value.
    fallbacks
        Operations without a rule of their own.
    probe_bytes
        What one tangent and all that comes of it take at the worst moment, about.
    """

    value: Tensor
    steps: tuple[Step, ...]
    result: int | None
    fallbacks: tuple[str, ...]
    probe_bytes: int

    def push(self, tangents: Tensor) -> Tensor:
        """Derivative along each tangent, `(probes, *shape)` to `(probes, *value.shape)`, without primal work."""
        if self.result is None or not tangents.shape[0]:
            return self.value.new_zeros((tangents.shape[0], *self.value.shape))
        with torch.no_grad():
            return self._replay(tangents, self.result, None)

    def trouble(self, tangents: Tensor) -> str | None:
        """The first operation that makes non-finite tangents of finite ones, None if there is none."""
        if self.result is None:
            return None
        found: list[str] = []
        with torch.no_grad():
            self._replay(tangents, self.result, found)
        return found[0] if found else None

    def _replay(self, tangents: Tensor, result: int, found: list[str] | None) -> Tensor:
        live = {0: tangents}
        for step in self.steps:
            inputs = prepared([live[number] for number in step.inputs], step.rule.lowering)
            for number in step.done:
                live.pop(number, None)
            outputs = step.rule.push(inputs, step.free)
            del inputs
            if isinstance(outputs, Tensor):
                outputs = (outputs,)
            for number, tangent in zip(step.outputs, outputs, strict=False):
                if number == NOBODYS:
                    continue
                live[number] = tangent
                if found is not None and not bool(tangent.isfinite().all()):
                    found.append(f"{step.name} in {step.place}")
        return raised(live[result]).resolve_conj().resolve_neg()


def make_tape(function: Callable[[Tensor], Tensor], point: Tensor) -> tuple[Tape | None, Record]:
    """Record a function at a point.

    Returns
    -------
        The tape, None where some operation cannot be recorded; and the record that says why.
    """
    value, found, result = record(function, point, copying=False)
    if found.failure is not None and found.writes:
        value, found, result = record(function, point, copying=True)
    if found.failure is not None:
        return None, found
    steps: tuple[Step, ...] = ()
    if result is not None:
        result = without_shifts(found, result)
        steps = replay_plan(found.entries, result)
    used = dict.fromkeys(f"{step.name} in {step.place}" for step in steps if step.rule.fallback)
    return Tape(value, steps, result, tuple(used), _peak(steps, found.sizes)), found


def replay_plan(entries: Sequence[Entry], result: int) -> tuple[Step, ...]:
    """Drop what the result does not need, and find out when each tangent is needed last."""
    needed = {result}
    kept: list[Entry] = []
    for entry in reversed(entries):
        if needed.intersection(entry.outputs):
            needed.update(entry.inputs)
            kept.append(entry)
    kept.reverse()
    family = _families(kept)
    last_use, last_family_use = {}, {family.get(0, 0): len(kept), family.get(result, result): len(kept)}
    for position, entry in enumerate(kept):
        for number in entry.inputs:
            last_use[number] = position
            last_family_use[family[number]] = max(position, last_family_use.get(family[number], 0))
    last_use[result] = len(kept)
    steps = []
    for position, entry in enumerate(kept):
        owners = [family[number] for number in entry.inputs]
        free = tuple(last_family_use[owner] == position and owners.count(owner) == 1 for owner in owners)
        dead = [number for number in entry.inputs if last_use[number] == position]
        assert entry.rule is not None
        outputs = tuple(number if number in last_use else NOBODYS for number in entry.outputs)
        steps.append(Step(entry.name, entry.place, entry.rule, entry.inputs, outputs, free, tuple(dead)))
    return tuple(steps)


def _peak(steps: Sequence[Step], sizes: Mapping[int, int]) -> int:
    """The most bytes of tangents that are alive at once, for one probe; views count as if they were none."""
    live = {0: sizes[0]}
    peak = sizes[0]
    for step in steps:
        live |= {number: sizes.get(number, 0) for number in step.outputs}
        peak = max(peak, sum(live.values()))
        for number in step.done:
            live.pop(number, None)
    return peak


def _families(entries: Sequence[Entry]) -> dict[int, int]:
    """Values whose tangents may share memory: each value to one that stands for its family."""
    family = {0: 0}
    for entry in entries:
        family |= {number: number for number in entry.outputs}
        assert entry.rule is not None
        if entry.rule.view:
            merged = {family[number] for number in (*entry.inputs, *entry.outputs)}
            chief = min(merged)
            for number, owner in family.items():
                if owner in merged:
                    family[number] = chief
    return family
