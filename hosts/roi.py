"""Questions to the probes that a replay kept: regions, correlations, spectra."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import h5py
import ismrmrd
import torch
from torch import Tensor

from voxelsigma.formats.hdf5 import open_hdf5
from voxelsigma.formats.image_file import series_names
from voxelsigma.formats.probe_file import TOKEN_KEY, KeptVolume, ProbeFile, open_probes, probe_path
from voxelsigma.noise.functionals import (
    Correlation,
    noise_correlation,
    voxel_sigma,
)
from voxelsigma.noise.sigma import SigmaMap
from voxelsigma.noise.spectrum import Spectrum, Window, noise_power_spectrum
from voxelsigma.noise.voxels import phase_factor

_HOW = "make it with 'voxelsigma replay … --keep-probes'"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Stack:
    """Slices, or one volume, that masks are laid over.

    Parameters
    ----------
    volumes
        Their kept probes, in the order of slices.
    first, last
        The slices looked at, `last` exclusive, counted over all of them.
    """

    volumes: tuple[KeptVolume, ...]
    first: int
    last: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """`(z, y, x)` of what is looked at."""
        return (self.last - self.first, *self.volumes[0].shape[1:])

    def parts(self) -> Iterator[tuple[KeptVolume, slice, slice]]:
        """Volumes that are looked at, with which of their slices, and where these lie in `shape`."""
        start = 0
        for volume in self.volumes:
            low, high = max(self.first, start), min(self.last, start + volume.shape[0])
            if low < high:
                yield volume, slice(low - start, high - start), slice(low - self.first, high - self.first)
            start += volume.shape[0]


@contextmanager
def kept_probes(output: Path) -> Iterator[ProbeFile]:
    """Open the probes that were kept with an image file, or a file of probes itself.

    Raises
    ------
    FileNotFoundError, OSError, ValueError
        If there are none, they are of another run, or a file is damaged.
    """
    with open_hdf5(output, "ISMRMRD images or kept probes") as file:
        itself = "voxelsigma_probes" in file.attrs
        tokens = set() if itself else _tokens(output, file)
    if itself:
        with open_probes(output) as kept:
            yield kept
        return
    path = probe_path(output)
    if not tokens:
        raise ValueError(f"{output}: no probes were kept with these images; {_HOW}")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; the probes that belong to {output} are expected there; {_HOW}")
    with open_probes(path) as kept:
        if kept.token not in tokens:
            raise ValueError(f"{path}: its probes are of another run than {output}; {_HOW}")
        yield kept


def stack_of(kept: ProbeFile, number: int = 0, slice_number: int | None = None) -> Stack:
    """Pick what masks are laid over.

    Parameters
    ----------
    kept
        The open file.
    number
        Which set of slices, in the order of contrast, phase, repetition and set.
    slice_number
        One slice of it; None for all.

    Raises
    ------
    ValueError
        If there is no such one.
    """
    groups: dict[tuple[int, ...], dict[int, KeptVolume]] = {}
    for volume in kept.volumes:
        counters = dict(volume.meta.counters)
        place = counters.pop("slice", 0)
        others = tuple(counters.get(name, 0) for name in ("contrast", "phase", "repetition", "set"))
        again = 0
        while place in groups.get((*others, again, *volume.shape), {}):
            again += 1
        groups.setdefault((*others, again, *volume.shape), {})[place] = volume
    if not 0 <= number < len(groups):
        raise ValueError(f"{kept.path}: has {len(groups)} sets of slices; there is none with number {number}")
    members = groups[sorted(groups)[number]]
    volumes = tuple(members[place] for place in sorted(members))
    total = sum(volume.shape[0] for volume in volumes)
    if slice_number is None:
        return Stack(volumes=volumes, first=0, last=total)
    if not 0 <= slice_number < total:
        raise ValueError(f"{kept.path}: has {total} slices; there is none with number {slice_number}")
    return Stack(volumes=volumes, first=slice_number, last=slice_number + 1)


def voxel_correlation(stack: Stack, voxel: tuple[int, int]) -> tuple[Correlation, SigmaMap, tuple[int, int], str]:
    """Correlation of a voxel of the one slice looked at with the plane of probes around it.

    Returns
    -------
        Correlation, σ of the plane's voxels, the voxel's place in the plane, and the plane's axes in words. In a volume
        that was decoupled along x this plane is `(z, y)`: across x the noise is independent.

    Raises
    ------
    ValueError
        If the voxel is outside, or there is more than one slice.
    """
    volume, inner = _one_slice(stack, "a voxel")
    y, x = voxel
    if not (0 <= y < stack.shape[1] and 0 <= x < stack.shape[2]):
        raise ValueError(f"roi: voxel {y},{x} is outside; the image has (y, x) = {stack.shape[1:]}")
    number, place, axes = (x, (inner.start, y), "(z, y)") if volume.plane_axis else (inner.start, (y, x), "(y, x)")
    whole = slice(None)
    direction = phase_factor(torch.from_numpy(volume.plane_image(number)))
    linear = volume.complex_linear[number]
    correlation = noise_correlation(volume.batches(number, whole, whole), direction, place, complex_linear=linear)
    sigma = voxel_sigma(volume.batches(number, whole, whole), direction, complex_linear=linear)
    return correlation, sigma, place, axes


def box_spectrum(stack: Stack, box: tuple[slice, slice], window: Window = "none") -> tuple[Spectrum, str]:
    """Noise power spectrum of a box `(y, x)` of the one slice looked at, and the unit of length.

    Raises
    ------
    ValueError
        If there is more than one slice, or the box is smaller than 4 × 4.
    """
    volume, inner = _one_slice(stack, "a spectrum")
    _, y_size, x_size = volume.meta.voxel_mm
    known = y_size > 0 and x_size > 0
    rows, columns = box
    direction = phase_factor(torch.from_numpy(volume.image()[inner.start, rows, columns]))
    spectrum = noise_power_spectrum(
        _draws(volume, inner.start, rows, columns),
        direction,
        spacing=(y_size, x_size) if known else (1.0, 1.0),
        window=window,
        complex_linear=all(volume.complex_linear),
    )
    return spectrum, "mm" if known else "voxel"


def _draws(volume: KeptVolume, z: int, rows: slice, columns: slice) -> Iterator[Tensor]:
    """Draws of the noise in a slice, `(probes, y, x)`: of a decoupled volume put together from its planes."""
    if volume.plane_axis == 0:
        yield from volume.batches(z, rows, columns)
        return
    planes = range(*columns.indices(volume.shape[2]))
    fewest = min(volume.probes[plane] for plane in planes)
    sources = [volume.batches(plane, slice(z, z + 1), rows, limit=fewest, share=len(planes)) for plane in planes]
    for parts in zip(*sources, strict=True):
        yield torch.stack([part[:, 0] for part in parts], dim=-1)


def _one_slice(stack: Stack, what: str) -> tuple[KeptVolume, slice]:
    if stack.shape[0] != 1:
        raise ValueError(f"roi: {what} is looked at in one slice; name one of the {stack.shape[0]} with --slice")
    volume, inner, _ = next(stack.parts())
    return volume, inner


def _tokens(path: Path, file: h5py.File) -> set[str]:
    """Names of the probe files with which the images of a file were made."""
    groups = [name for name in file if series_names(file, name)]
    if not groups:
        raise ValueError(f"{path}: holds neither images nor kept probes; groups present: {list(file)}")
    found = set()
    for group in groups:
        for name in series_names(file, group):
            for text in file[group][name]["attributes"][:].ravel():
                meta = ismrmrd.Meta.deserialize(text.decode() if isinstance(text, bytes) else text)
                if token := meta.get(TOKEN_KEY):
                    found.add(str(token))
    return found
