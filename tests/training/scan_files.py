"""Small files of measured scans, made for the tests."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from voxelsigma.formats.raw_writer import write_raw
from voxelsigma.formats.simulate import SimulatedScan, Simulation, simulate
from voxelsigma.noise.fourier import fft_centred, ifft_centred

FULL = Simulation(
    matrix=(1, 48, 40), coils=4, acceleration=1.0, mask="uniform_1d", reference_lines=0, slices=2, noise_samples=4096
)


def ismrmrd_file(path: Path, simulation: Simulation = FULL, **changes: Any) -> SimulatedScan:
    """Write a simulated scan."""
    scan = simulate(replace(simulation, **changes))
    write_raw(path, scan.header_xml, scan.blocks)
    return scan


def imaging_kspace(scan: SimulatedScan, number: int) -> NDArray[np.complex64]:
    """Readouts of a slice as k-space `(coils, k1, k0)`, oversampled."""
    for block in scan.blocks[-len(scan.objects) :]:
        if int(block.headers["idx"]["slice"][0]) == number:
            return np.ascontiguousarray(np.moveaxis(block.samples, 0, 1))
    raise AssertionError(f"no slice {number}")


def fastmri_file(
    path: Path, *, padding: int = 4, header: bool = True, scale: float = 1e-6, **changes: Any
) -> SimulatedScan:
    """Write a simulated scan as fastMRI does: axes (slices, coils, readout, phase encoding), padded at both sides."""
    scan = simulate(replace(FULL, **{"noise_samples": 0, "matrix": (1, 64, 48), **changes}))
    kspace = np.stack([imaging_kspace(scan, number) for number in range(len(scan.objects))])
    kspace = np.pad(kspace, ((0, 0), (0, 0), (padding, padding), (0, 0)))
    with h5py.File(path, "w") as file:
        file["kspace"] = np.ascontiguousarray((scale * kspace).swapaxes(2, 3).astype(np.complex64))
        if header:
            file["ismrmrd_header"] = scan.header_xml
    return scan


def images_of(kspace: NDArray[np.complex64]) -> NDArray[np.complex64]:
    """Coil images of k-space `(..., k1, k0)`."""
    return np.asarray(ifft_centred(ifft_centred(kspace, axis=-1), axis=-2))


def kspace_of(images: NDArray[np.complex64]) -> NDArray[np.complex64]:
    """K-space of coil images `(..., y, x)`."""
    return np.asarray(fft_centred(fft_centred(images, axis=-1), axis=-2))
