"""Print how much the control variates save at every acceleration: `python -m bench.acceleration`.

The shipped unrolled network, 96², 8 coils, SNR 20, masks along two axes and along one. r² is the part of σ² that the
covariate explains, median over the object; the error is that of the magnitude map at 16 and 64 probes, over the plain
estimate's of the same probes, against a reference of its own probes, whose variance is taken off.
"""

from collections.abc import Iterator, Sequence
from typing import Final

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench.error import COVARIATES
from bench.networks import COILS, SHIPPED, Case, data_folder, make_case
from voxelsigma.formats.masks import Kind
from voxelsigma.noise.linearize import Linearization, linearize
from voxelsigma.noise.sigma import SigmaMap
from voxelsigma.noise.sketch import Stopping, sketch
from voxelsigma.noise.voxels import object_mask

SIZE: Final = 96
GROUPS: Final = 4
REFERENCE: Final = 384
COUNTS: Final = (16, 64)
CASES: Sequence[tuple[Kind, float]] = (
    *(("random_2d", r) for r in (1.1, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0)),
    *(("random_1d", r) for r in (2.0, 3.0, 4.0, 6.0)),
)
"""Kinds of masks and accelerations."""


def main() -> None:
    """Measure."""
    table = Table(title=f"Control variates, {SHIPPED}, {SIZE}², {COILS} coils: r², error over plain")
    for column in (
        "mask",
        "R",
        *(f"{name} {what}" for name in ("w", "filtered w") for what in ("r²", *map(str, COUNTS))),
    ):
        table.add_column(column, justify="right")
    for kind, acceleration in track(CASES, console=Console(stderr=True)):
        table.add_row(kind, f"{acceleration:g}", *row(kind, acceleration))
    Console(width=120).print(table)


def row(kind: Kind, acceleration: float) -> Iterator[str]:
    """r² and error ratios of both covariates."""
    case = make_case(SHIPPED, (SIZE, SIZE), acceleration=acceleration, data=data_folder(), kind=kind)
    linearization = linearize(case.reconstruction, case.kspace)
    inside = object_mask(linearization.value)
    reference = sketch(
        linearization, case.source(10**6), Stopping(probes=REFERENCE), covariate=case.plane.covariate()
    ).map()
    own = float(reference.relative_error()[inside].square().mean())

    def errors(name: str) -> tuple[float, list[float]]:
        squares = []
        for count in COUNTS:
            maps = list(estimates(case, linearization, name, count))
            relative = torch.stack([found.sigma / reference.sigma - 1 for found in maps])[:, inside]
            squares.append(float(relative.square().mean()) - own)
        return float(maps[0].explained[inside].median()), squares

    plain = errors("plain")[1]
    for name in ("zero-filled", "learned filter"):
        explained, found = errors(name)
        yield f"{explained:.2f}"
        yield from (f"{(one / other) ** 0.5:.2f}" for one, other in zip(found, plain, strict=True))


def estimates(case: Case, linearization: Linearization, name: str, count: int) -> Iterator[SigmaMap]:
    """Maps of independent groups of probes."""
    for group in range(GROUPS):
        source = case.source(100 * count + group)
        yield sketch(linearization, source, Stopping(probes=count), covariate=COVARIATES[name](case)).map()


if __name__ == "__main__":
    main()
