"""What a recorded evaluation leaves."""

from dataclasses import dataclass, field

from voxelsigma.noise.tape_call import Rule


@dataclass(slots=True)
class Entry:
    """One operation on the tape: which values it takes and gives, and its rule, None until that is found."""

    name: str
    place: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    rule: Rule | None


@dataclass(slots=True)
class Record:
    """What a recorded evaluation left.

    Parameters
    ----------
    entries
        Operations that depend on the input, in order. Value 0 is the input.
    failure
        Why there is no complete tape; None where there is.
    writes
        Whether it failed over writing into a tensor, which another way of recording may resolve.
    random, cuts
        Random operations; operations that end the dependence on the input.
    detached
        Those of the cuts that hand on the value itself, so that a derivative may be missed.
    sizes
        Bytes of each value.
    """

    entries: list[Entry] = field(default_factory=list)
    failure: str | None = None
    writes: bool = False
    random: list[str] = field(default_factory=list)
    cuts: list[str] = field(default_factory=list)
    detached: list[str] = field(default_factory=list)
    sizes: dict[int, int] = field(default_factory=dict)

    def cut(self, where: str, *, detached: bool) -> None:
        """Note that the dependence on the input ends somewhere."""
        self.cuts.append(where)
        if detached:
            self.detached.append(where)
