"""Reconstruct measured brains beside BART, and draw them: `python -m bench.brains`.

Needs `brain_8ch_full.mat` and `brain_8ch_poisson.npy` of the data folder (`VOXELSIGMA_TEST_DATA`, or `../shared/data`)
and, for the comparison, BART on the path. Neither scan has a noise measurement: the covariance is that of the edge of
k-space.

Pictures go to `docs/brain_full.png` and `docs/brain_poisson.png`; the PSNR and SSIM of the first, against its own full
sampling, are printed.
"""

import argparse
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.io
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.networks import data_folder
from voxelsigma.formats.masks import make_mask
from voxelsigma.models.cards import load_card, load_model
from voxelsigma.models.espirit import EspiritSettings, espirit
from voxelsigma.models.fourier import ifft_centred
from voxelsigma.models.network import Network
from voxelsigma.noise.covariance import estimate_covariance, whitening_matrix
from voxelsigma.noise.edge import edge_covariance
from voxelsigma.training.compare import least_squares, sketched, zero_filled
from voxelsigma.training.example import Example, collate
from voxelsigma.training.metrics import psnr, ssim

NETWORKS = ("unrolled_small", "modl_small", "varnet_small", "unet_small")
PROBES = 64
REFERENCE_LINES = 24
WAVELET, TIKHONOV = 0.003, 0.01

Complex = NDArray[np.complex64]


@dataclass(frozen=True)
class Scan:
    """A measured slice: whitened k-space, what was sampled of it, and the image of full sampling if there is one."""

    name: str
    example: Example
    reference: Tensor | None


def main() -> None:
    """Draw both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs"))
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS))
    options = parser.parse_args()
    folder = data_folder()
    if folder is None:
        raise SystemExit("bench.brains: no data folder; VOXELSIGMA_TEST_DATA names it")
    for scan in (full_scan(Path(folder)), poisson_scan(Path(folder))):
        images, sigmas = reconstructed(scan, options.networks)
        if scan.reference is not None:
            Console().print(scores(scan, scan.reference, images))
        draw(scan, images, sigmas, options.out / f"brain_{scan.name}.png")


def full_scan(folder: Path) -> Scan:
    """The fully sampled slice, random lines of it at R = 4."""
    kspace = np.moveaxis(scipy.io.loadmat(folder / "brain_8ch_full.mat")["full_kspace_data"], -1, 0)
    kspace = np.ascontiguousarray(kspace, np.complex64)
    rows = kspace.shape[1]
    found = edge_covariance(
        np.ascontiguousarray(np.moveaxis(kspace, 0, 1)), np.abs(np.arange(rows) - rows // 2), 5.0, oversampled=False
    )
    white = whitened(kspace, found.matrix)
    mask = make_mask("random_1d", kspace.shape[1:], 4, centre=REFERENCE_LINES, rng=np.random.default_rng(4))
    maps = torch.from_numpy(calibration(white, mask))
    image = (maps.conj() * ifft_centred(torch.from_numpy(white))).sum(dim=0)
    return Scan("full", as_example(white, mask, maps), image)


def poisson_scan(folder: Path) -> Scan:
    """The slice that was measured with a Poisson-disc mask, both axes being phase encodings."""
    kspace = np.load(folder / "brain_8ch_poisson.npy").astype(np.complex64)
    mask = np.abs(kspace).sum(axis=0) > 0
    axes = [(np.arange(size) - size // 2) / size for size in mask.shape]
    radius = np.hypot(*np.meshgrid(*axes, indexing="ij"))
    outer = mask & (radius >= np.quantile(radius[mask], 0.95))
    white = whitened(kspace, estimate_covariance(kspace[None, :, outer]))
    return Scan("poisson", as_example(white, mask, torch.from_numpy(calibration(white, mask))), None)


def whitened(kspace: Complex, covariance: Complex) -> Complex:
    """K-space whose noise has variance 2."""
    matrix = whitening_matrix(covariance, float(np.sqrt(2)))
    return np.einsum("ij,j...->i...", matrix, kspace).astype(np.complex64)


def calibration(kspace: Complex, mask: NDArray[np.bool_]) -> Complex:
    """Sensitivities by ESPIRiT from the fully sampled centre."""
    sampled = torch.from_numpy(kspace * mask)
    return espirit(sampled, mask.shape, EspiritSettings()).contiguous().numpy()


def as_example(kspace: Complex, mask: NDArray[np.bool_], maps: Tensor) -> Example:
    """The undersampled scan."""
    sampled = mask.astype(np.float32)
    return Example(
        torch.from_numpy(kspace * sampled).to(torch.complex64),
        maps.to(torch.complex64),
        torch.from_numpy(sampled)[None],
        None,
    )


def reconstructed(scan: Scan, names: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Images and σ maps by name; BART's without σ."""
    images = {"zero-filled": zero_filled(collate([scan.example]))[0]}
    images["least squares"] = least_squares(collate([scan.example]), 0.05)[0]
    images |= {f"BART {name}": image for name, image in bart(scan.example).items()}
    sigmas = {}
    for name in names:
        model = load_model(load_card(name), torch.device("cpu"))
        assert isinstance(model, Network)
        with torch.no_grad():
            linearization, found = sketched(model, scan.example, probes=PROBES, seed=1)
        images[name], sigmas[name] = linearization.value, found.map().sigma
    return images, sigmas


def bart(example: Example) -> dict[str, Tensor]:
    """BART's reconstructions of the same samples with the same sensitivities; none where there is no BART."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_cfl(folder / "kspace", example.kspace.numpy())
        write_cfl(folder / "maps", example.sensitivities.numpy())
        if shutil.which("bart") is None:
            Console(stderr=True).print("bench.brains: no BART on the path; drawn without it")
            return {}
        run(folder, "pics", "-S", "-i100", f"-RW:3:0:{WAVELET}", "kspace", "maps", "wavelet")
        run(folder, "pics", "-S", "-i100", f"-RQ:{TIKHONOV}", "kspace", "maps", "tikhonov")
        shape = tuple(example.kspace.shape[1:])
        return {
            "pics, wavelet": torch.from_numpy(read_cfl(folder / "wavelet", shape)),
            "pics, l2": torch.from_numpy(read_cfl(folder / "tikhonov", shape)),
        }


def run(folder: Path, *arguments: str) -> None:
    """Run BART."""
    subprocess.run(["bart", *arguments], cwd=folder, check=True, capture_output=True, timeout=600)


def write_cfl(path: Path, kspace: Complex) -> None:
    """Write `(coils, k1, k0)` as BART has it: k1, k0, 1, coils, the first axis fastest."""
    coils, rows, columns = kspace.shape
    path.with_suffix(".hdr").write_text(f"# Dimensions\n{rows} {columns} 1 {coils}\n")
    np.moveaxis(kspace, 0, -1).astype(np.complex64).ravel(order="F").tofile(path.with_suffix(".cfl"))


def read_cfl(path: Path, shape: tuple[int, ...]) -> Complex:
    """Read one image."""
    values = np.fromfile(path.with_suffix(".cfl"), np.complex64)
    return values.reshape(shape, order="F").copy()


def scores(scan: Scan, reference: Tensor, images: Mapping[str, Tensor]) -> Table:
    """PSNR and SSIM against full sampling, each image at its best scale."""
    table = Table("reconstruction", "PSNR dB", "SSIM", title=f"brain_{scan.name}")
    for name, image in images.items():
        fitted = scaled_to(image, reference)
        table.add_row(name, f"{float(psnr(fitted, reference)):.1f}", f"{ssim(fitted, reference):.3f}")
    return table


def scaled_to(image: Tensor, reference: Tensor) -> Tensor:
    """The magnitude times the factor that brings it nearest to another: BART has units of its own."""
    magnitude, wanted = image.abs(), reference.abs()
    return magnitude * (magnitude * wanted).sum() / magnitude.square().sum()


def draw(scan: Scan, images: Mapping[str, Tensor], sigmas: Mapping[str, Tensor], path: Path) -> None:
    """Images above, σ maps below."""
    shown = dict(images)
    common = scan.reference if scan.reference is not None else images[next(iter(sigmas))]
    if scan.reference is not None:
        shown = {"fully sampled": scan.reference, **shown}
    columns = -(-len(shown) // 2)
    figure = Figure(figsize=(2.5 * columns, 8.4), layout="constrained")
    axes = figure.subplots(3, columns, squeeze=False)
    for place in axes.flat:
        place.axis("off")
    top = float(common.abs().flatten().kthvalue(round(0.995 * common.numel())).values)
    for place, (name, image) in zip(axes.flat, shown.items(), strict=False):
        place.imshow(scaled_to(image, common), cmap="gray", vmin=0, vmax=top)
        place.set_title(name, fontsize=9)
    highest = max(float(one.flatten().kthvalue(round(0.99 * one.numel())).values) for one in sigmas.values())
    drawn = None
    for place, (name, sigma) in zip(axes[2], sigmas.items(), strict=False):
        drawn = place.imshow(sigma, cmap="viridis", vmin=0, vmax=highest)
        place.set_title(f"σ, {name}", fontsize=9)
    if drawn is not None:
        figure.colorbar(drawn, ax=list(axes[2]), shrink=0.8, label="SNR units")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
