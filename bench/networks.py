"""What is measured: networks bound to scans."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor, nn

from bench.processes import ROOT
from voxelsigma.formats.coils import coil_sensitivities, unit_norm
from voxelsigma.formats.masks import Kind, make_mask
from voxelsigma.formats.phantom import head_phantom
from voxelsigma.models.cards import load_card, load_model
from voxelsigma.models.encoding import SenseEncoding
from voxelsigma.models.modl import Modl
from voxelsigma.models.network import Network, NetworkReconstruction
from voxelsigma.models.problem import PlaneProblem
from voxelsigma.models.unet import ImageUNet
from voxelsigma.models.unrolled import Unrolled
from voxelsigma.models.varnet import VarNet
from voxelsigma.noise.probes import ProbeSource
from voxelsigma.training.examples import ExampleSettings
from voxelsigma.training.held_out import held_out_scans
from voxelsigma.training.volumes import load_volumes

COILS, CENTRE, SNR = 8, 16, 20.0
HELD_OUT: Final = "head_07"
SHIPPED: Final = "unrolled 32"

Size = tuple[int, int]

RANDOM: Mapping[str, Callable[[], nn.Module]] = {
    "unrolled 64": partial(Unrolled, channels=64),
    "MoDL": Modl,
    "U-Net": ImageUNet,
    "VarNet, 2 cascades": partial(VarNet, cascades=2),
    "tiny": partial(Unrolled, steps=1, blocks=1, channels=4),
}
"""Networks with random weights, of torch's own initial scale; `tiny` is for tests."""

SETTINGS: tuple[tuple[str, Size], ...] = (
    (SHIPPED, (128, 128)),
    ("unrolled 64", (128, 128)),
    ("MoDL", (128, 128)),
    ("U-Net", (128, 128)),
    ("VarNet, 2 cascades", (128, 128)),
    (SHIPPED, (320, 256)),
    ("unrolled 64", (320, 256)),
)
QUICK: tuple[tuple[str, Size], ...] = SETTINGS[:2]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A network bound to a scan.

    Parameters
    ----------
    reconstruction, plane, kspace
        Of one plane; k-space `(coils, k1, k0)`.
    scan
        The scan in words.
    """

    reconstruction: NetworkReconstruction
    plane: PlaneProblem
    kspace: Tensor
    scan: str

    def source(self, seed: int) -> ProbeSource:
        return ProbeSource(variance=self.plane.variance, coils=len(self.kspace), seed=seed)


def make_case(
    name: str,
    size: Size,
    *,
    acceleration: float = 4.0,
    data: str | None = None,
    seed: int = 1,
    kind: Kind = "random_2d",
) -> Case:
    """A network and a scan, SNR 20, 8 coils: of a held-out head in the folder `data`, else the phantom."""
    maps, mask, kspace, scan = (
        _phantom(size, acceleration, seed, kind) if data is None else _head(size, acceleration, data, seed, kind)
    )
    edges = ((0, size[0] - 1), (0, size[1] - 1))
    plane = PlaneProblem(sensitivities=maps, variance=2 * mask, weights=mask, limits=edges, size=size)
    reconstruction = _network(name).bind(plane)
    assert isinstance(reconstruction, NetworkReconstruction)
    return Case(reconstruction=reconstruction, plane=plane, kspace=kspace, scan=scan)


def data_folder() -> str | None:
    """Where held-out heads are, if anywhere."""
    folder = Path(os.environ.get("VOXELSIGMA_TEST_DATA", ROOT.parent / "shared" / "data"))
    return str(folder) if any(folder.rglob(f"{HELD_OUT}.nii*")) else None


def _network(name: str) -> Network:
    if name == SHIPPED:
        shipped = load_model(load_card("unrolled_small"), torch.device("cpu"))
        assert isinstance(shipped, Network)
        return shipped
    torch.manual_seed(0)
    module = RANDOM[name]().eval().requires_grad_(False)
    return Network(function=module, estimates_sensitivities=getattr(module, "estimates_sensitivities", False))


def _phantom(size: Size, acceleration: float, seed: int, kind: Kind) -> tuple[Tensor, Tensor, Tensor, str]:
    rng = np.random.default_rng(seed)
    maps = torch.from_numpy(unit_norm(coil_sensitivities(COILS, size)))
    rows, columns = ((np.arange(length) - length // 2) * 2 / length for length in size)
    image = torch.from_numpy(head_phantom(0.0, rows[:, None], columns)).to(torch.complex64)
    image *= SNR / image.abs()[image.abs() > 0].mean()
    centre = min(CENTRE, min(size) // 4)
    mask = torch.from_numpy(make_mask(kind, size, acceleration, centre=centre, rng=rng)).float()
    noise = torch.from_numpy(rng.standard_normal((2, COILS, *size), dtype=np.float32))
    kspace = SenseEncoding(maps, mask).forward(image) + mask * torch.complex(noise[0], noise[1])
    return maps, mask, kspace, "head phantom"


def _head(size: Size, acceleration: float, data: str, seed: int, kind: Kind) -> tuple[Tensor, Tensor, Tensor, str]:
    if size[0] != size[1]:
        raise ValueError(f"bench: scans of heads are square, got {size}")
    settings = replace(
        ExampleSettings(kinds=(kind,), many_coils_share=0.0, support_share=0.0, centre=CENTRE),
        matrix=size,
        coils=(COILS, COILS),
        acceleration=(acceleration, acceleration),
        snr=(SNR, SNR),
    )
    drawn = held_out_scans(load_volumes(Path(data), only=[HELD_OUT]), settings, slices=1, seed=seed)
    return drawn.sensitivities[0], drawn.mask[0, 0], drawn.kspace[0], f"held-out {HELD_OUT}"
