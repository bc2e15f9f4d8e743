"""Simulation of a multi-coil, accelerated Cartesian scan with a noise measurement and correlated coils."""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from ismrmrd import constants

from voxelsigma.formats.coils import coil_sensitivities, random_noise_covariance
from voxelsigma.formats.masks import Kind, make_mask
from voxelsigma.formats.phantom import head_phantom
from voxelsigma.formats.readouts import HEADER_DTYPE, ReadoutBlock

BANDWIDTH: Final = 0.793
DWELL_US: Final = 5.0
NOISE_DWELL_US: Final = 10.0
FIELD_OF_VIEW_MM: Final = 240.0
SLICE_MM: Final = 5.0

ComplexArray = npt.NDArray[np.complex64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulation:
    """What scan to simulate.

    Parameters
    ----------
    matrix
        Reconstructed matrix `(z, y, x)`; z above 1 makes a 3D scan with two phase encoding axes.
    coils
        Number of receive coils.
    acceleration
        R.
    mask
        `uniform_1d`, `random_1d`, `random_2d` or `poisson_disc`; the last two need two phase encoding axes.
    reference_lines
        Width of the fully sampled centre: lines, or the side of a square for 2D masks.
    snr
        Mean object magnitude of the fully sampled unit-norm image over the noise's standard deviation per component.
    slices, repetitions, averages
        How many of each.
    noise_samples
        Samples per coil of the noise measurement; 0 leaves it out.
    oversampling
        Readout oversampling, 1 or 2.
    correlation
        Noise correlation of neighbouring coils.
    seed
        Seed of everything random.
    """

    matrix: tuple[int, int, int] = (1, 128, 128)
    coils: int = 8
    acceleration: float = 4.0
    mask: Kind = "random_1d"
    reference_lines: int = 24
    snr: float = 20.0
    slices: int = 1
    repetitions: int = 1
    averages: int = 1
    noise_samples: int = 16384
    oversampling: int = 2
    correlation: float = 0.3
    seed: int = 0

    def __post_init__(self) -> None:
        ranges: dict[str, tuple[float, float]] = {
            "coils": (1, 128),
            "snr": (1e-3, 1e6),
            "slices": (1, 1000),
            "repetitions": (1, 1000),
            "averages": (1, 1000),
            "noise_samples": (0, 10**7),
            "oversampling": (1, 2),
            "correlation": (0, 0.99),
            "reference_lines": (0, 65535),
        }
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"simulate: {name} must be from {low:g} to {high:g}, got {value!r}")
        if min(self.matrix[1:]) < 16 or max(self.matrix) > 1024 or self.matrix[0] < 1:
            raise ValueError(
                f"simulate: matrix must have y and x from 16 to 1024 and z from 1, got (z, y, x) = {self.matrix}"
            )
        volumetric = self.matrix[0] > 1
        if self.mask in ("random_2d", "poisson_disc") and not volumetric:
            raise ValueError(
                f"simulate: mask {self.mask!r} samples two phase encoding axes; the matrix needs z above 1, got 1"
            )
        if volumetric and self.slices > 1:
            raise ValueError(f"simulate: a 3D scan has one slab, got slices {self.slices}")


@dataclass(frozen=True, slots=True)
class SimulatedScan:
    """A simulated scan and its truth.

    Parameters
    ----------
    header_xml
        ISMRMRD header.
    blocks
        Readouts: the noise measurement first.
    mask
        Imaging lines, shape `(k2, k1)`, boolean.
    sensitivities
        Of the coils as simulated (before whitening), shape `(slices, coils, z, y, x)`.
    objects
        The object times its scale, shape `(slices, z, y, x)`.
    covariance
        Noise covariance of the noise readouts, shape `(coils, coils)`.
    """

    header_xml: bytes
    blocks: list[ReadoutBlock]
    mask: npt.NDArray[np.bool_]
    sensitivities: ComplexArray
    objects: ComplexArray
    covariance: npt.NDArray[Any]


def simulate(settings: Simulation) -> SimulatedScan:
    """Simulate a scan of the head phantom.

    The object is rasterised twice as finely as the matrix and its k-space cropped, so that images ring as real ones do.
    Noise is white in time, correlated between coils, and scaled so that whitening with the noise measurement
    leaves a variance of 2.

    Raises
    ------
    ValueError
        If the settings contradict each other or the mask cannot be made.
    """
    rng = np.random.default_rng(settings.seed)
    mask = _mask(settings, rng)
    covariance = random_noise_covariance(settings.coils, correlation=settings.correlation, rng=rng)
    factor = np.linalg.cholesky(covariance)
    # what a whitened imaging sample's noise must be scaled by to have variance 2
    imaging = np.sqrt(NOISE_DWELL_US / (DWELL_US * BANDWIDTH)) * factor
    slices = [_slice(settings, number) for number in range(settings.slices)]
    scale = _scale(settings, slices, imaging)
    blocks = [_noise_block(settings, factor, rng)] if settings.noise_samples else []
    spaces = [_kspace(settings, fine_object * scale, fine_maps) for fine_object, fine_maps in slices]
    for repetition in range(settings.repetitions):
        for number, kspace in enumerate(spaces):
            for average in range(settings.averages):
                counters = {"slice": number, "repetition": repetition, "average": average}
                blocks.append(_imaging_block(settings, kspace, mask, imaging, rng, counters))
    for number, block in enumerate(blocks):
        start = sum(map(len, blocks[:number]))
        block.headers["scan_counter"] = np.arange(start, start + len(block)) + 1
        block.headers["acquisition_time_stamp"] = np.arange(start, start + len(block)) * 2
    return SimulatedScan(
        header_xml=_header_xml(settings),
        blocks=blocks,
        mask=mask,
        sensitivities=np.stack([_coarse(maps) for _, maps in slices]),
        objects=np.stack([_coarse(objects * scale) for objects, _ in slices]),
        covariance=covariance,
    )


def _mask(settings: Simulation, rng: np.random.Generator) -> npt.NDArray[np.bool_]:
    """Imaging lines `(k2, k1)`."""
    depth, rows, _ = settings.matrix
    flat = settings.mask not in ("random_2d", "poisson_disc")
    shape = (rows, 1) if flat else (depth, rows)
    try:
        mask = make_mask(settings.mask, shape, settings.acceleration, centre=settings.reference_lines, rng=rng)
    except ValueError as error:
        raise ValueError(
            f"simulate: no mask with acceleration {settings.acceleration:g} and reference_lines "
            f"{settings.reference_lines}: {error}"
        ) from None
    return np.broadcast_to(mask[:, 0], (depth, rows)).copy() if flat else mask


def _slice(settings: Simulation, number: int) -> tuple[ComplexArray, ComplexArray]:
    """Object `(z, y, x)` and sensitivities `(coils, z, y, x)` of a slice, twice as fine in every encoded axis."""
    depth, rows, columns = settings.matrix
    fine = (1 if depth == 1 else 2 * depth, 2 * rows, 2 * columns)
    y, x = ((np.arange(size) - size // 2) * 2 / size for size in fine[1:])
    if depth == 1:
        z = np.array([0.0 if settings.slices == 1 else 0.9 * (number / (settings.slices - 1) - 0.5)])
    else:
        z = (np.arange(fine[0]) - fine[0] // 2) * 2 / fine[0]
    phantom = head_phantom(z[:, None, None], y[:, None], x)
    phase = 0.6 * y[:, None] + 0.9 * x**2 + 0.4 * z[:, None, None]
    image = (phantom * np.exp(1j * phase)).astype(np.complex64)
    maps = coil_sensitivities(settings.coils, fine[1:] if depth == 1 else fine)
    return image, maps[:, None] if depth == 1 else maps


def _scale(settings: Simulation, slices: list[tuple[ComplexArray, ComplexArray]], imaging: npt.NDArray[Any]) -> float:
    """Scale of the object that gives the wanted SNR in the whitened, unit-norm combined image."""
    inverse = np.sqrt(2) * np.linalg.inv(imaging)
    total, voxels = 0.0, 0
    for image, maps in slices:
        inside = np.abs(image) > 0.1 * np.abs(image).max()
        norm = np.linalg.norm(inverse @ maps[:, inside], axis=0)
        total += float((norm * np.abs(image[inside])).sum())
        voxels += int(inside.sum())
    return settings.snr / (total / voxels)


def _kspace(settings: Simulation, image: ComplexArray, maps: ComplexArray) -> ComplexArray:
    """Noise-free k-space `(coils, k2, k1, k0)` with an oversampled readout.

    A coarse voxel's intensity is that of the fine grid: cropping an orthonormal transform keeps it up to the root of
    the number of voxels left out.
    """
    depth, rows, columns = settings.matrix
    wide = settings.oversampling * image.shape[-1]
    before = wide // 2 - image.shape[-1] // 2
    padding = ((0, 0),) * 3 + ((before, wide - image.shape[-1] - before),)
    coil_images = np.pad(maps * image, padding)
    wanted = (depth, rows, settings.oversampling * columns)
    kspace = coil_images
    for axis, size in zip((1, 2, 3), wanted, strict=True):
        kspace = np.fft.fftshift(np.fft.fft(np.fft.ifftshift(kspace, axes=axis), axis=axis, norm="ortho"), axes=axis)
        found = kspace.shape[axis]
        first = found // 2 - size // 2
        kspace = np.take(kspace, np.arange(first, first + size), axis=axis) * np.sqrt(size / found)
    return kspace.astype(np.complex64)


def _noise_block(settings: Simulation, factor: npt.NDArray[Any], rng: np.random.Generator) -> ReadoutBlock:
    length = min(settings.noise_samples, settings.oversampling * settings.matrix[2])
    count = -(-settings.noise_samples // length)
    white = _white((count, settings.coils, length), rng) / np.sqrt(2)
    headers = _headers(settings, count, length)
    headers["flags"] = _flag(constants.ACQ_IS_NOISE_MEASUREMENT)
    headers["sample_time_us"] = NOISE_DWELL_US
    return _block(headers, np.einsum("ab,nbk->nak", factor, white))


def _imaging_block(
    settings: Simulation,
    kspace: ComplexArray,
    mask: npt.NDArray[np.bool_],
    imaging: npt.NDArray[Any],
    rng: np.random.Generator,
    counters: dict[str, int],
) -> ReadoutBlock:
    """All readouts of one slice and average: imaging lines, and reference lines in the first average."""
    centre = _centre(settings)
    acquired = mask | centre if counters["average"] == 0 else mask
    lines = np.argwhere(acquired)
    samples = kspace[:, lines[:, 0], lines[:, 1]].transpose(1, 0, 2)
    white = _white(samples.shape, rng) / np.sqrt(2)
    headers = _headers(settings, len(lines), samples.shape[2])
    headers["idx"]["kspace_encode_step_2"], headers["idx"]["kspace_encode_step_1"] = lines.T
    for name, value in counters.items():
        headers["idx"][name] = value
    headers["position"][:, 2] = SLICE_MM * (counters["slice"] - (settings.slices - 1) / 2)
    imaged, referenced = mask[tuple(lines.T)], centre[tuple(lines.T)]
    both, only = (
        constants.ACQ_IS_PARALLEL_CALIBRATION_AND_IMAGING,
        constants.ACQ_IS_PARALLEL_CALIBRATION,
    )
    headers["flags"][referenced & imaged] |= _flag(both)
    headers["flags"][referenced & ~imaged] |= _flag(only)
    headers["flags"][0] |= _flag(constants.ACQ_FIRST_IN_SLICE)
    headers["flags"][-1] |= _flag(constants.ACQ_LAST_IN_SLICE)
    if counters["slice"] == settings.slices - 1 and counters["average"] == settings.averages - 1:
        headers["flags"][-1] |= _flag(constants.ACQ_LAST_IN_REPETITION)
        if counters["repetition"] == settings.repetitions - 1:
            headers["flags"][-1] |= _flag(constants.ACQ_LAST_IN_MEASUREMENT)
    return _block(headers, samples + np.einsum("ab,nbk->nak", imaging, white))


def _centre(settings: Simulation) -> npt.NDArray[np.bool_]:
    """Reference lines `(k2, k1)`."""
    depth, rows, _ = settings.matrix
    centre = np.zeros((depth, rows), dtype=bool)
    width = min(settings.reference_lines, rows)
    first = rows // 2 - width // 2
    height = min(settings.reference_lines, depth)
    low = depth // 2 - height // 2
    centre[low : low + height, first : first + width] = True
    return centre


def _headers(settings: Simulation, count: int, length: int) -> npt.NDArray[np.void]:
    headers = np.zeros(count, dtype=HEADER_DTYPE)
    headers["version"] = 1
    headers["measurement_uid"] = 1
    headers["number_of_samples"], headers["center_sample"] = length, length // 2
    headers["available_channels"] = headers["active_channels"] = settings.coils
    headers["sample_time_us"] = DWELL_US
    for name, axis in (("read_dir", 0), ("phase_dir", 1), ("slice_dir", 2)):
        headers[name][:, axis] = 1
    return headers


def _block(headers: npt.NDArray[np.void], samples: npt.NDArray[Any]) -> ReadoutBlock:
    trajectory = np.zeros((len(headers), samples.shape[2], 0), dtype=np.float32)
    return ReadoutBlock(headers, np.ascontiguousarray(samples, dtype=np.complex64), trajectory)


def _white(shape: tuple[int, ...], rng: np.random.Generator) -> npt.NDArray[np.complex64]:
    """Complex noise with standard deviation 1 per component."""
    parts = rng.standard_normal((2, *shape), dtype=np.float32)
    return (parts[0] + 1j * parts[1]).astype(np.complex64)


def _flag(number: int) -> np.uint64:
    return np.uint64(1 << (number - 1))


def _coarse(fine: ComplexArray) -> ComplexArray:
    """Every second voxel of the last two axes (and of z in 3D): the centres agree."""
    step = (slice(None),) * (fine.ndim - 3)
    depth = slice(None) if fine.shape[-3] == 1 else slice(None, None, 2)
    chosen = (*step, depth, slice(None, None, 2), slice(None, None, 2))
    return fine[chosen]


def _header_xml(settings: Simulation) -> bytes:
    depth, rows, columns = settings.matrix
    wide = settings.oversampling * columns
    thickness = SLICE_MM if depth == 1 else FIELD_OF_VIEW_MM * depth / rows
    regular = settings.mask == "uniform_1d"
    # a nominal factor above 1 tells that not every line is called for
    factors = (max(1 if regular else 2, round(settings.acceleration)), 1)
    if settings.mask in ("random_2d", "poisson_disc"):
        factors = (max(2, round(settings.acceleration**0.5)), max(1, round(settings.acceleration**0.5)))
    limits = {
        "kspace_encoding_step_1": (rows - 1, rows // 2),
        "kspace_encoding_step_2": (depth - 1, depth // 2),
        "average": (settings.averages - 1, 0),
        "slice": (settings.slices - 1, 0),
        "contrast": (0, 0),
        "phase": (0, 0),
        "repetition": (settings.repetitions - 1, 0),
        "set": (0, 0),
        "segment": (0, 0),
    }
    limits_xml = "".join(
        f"<{name}><minimum>0</minimum><maximum>{last}</maximum><center>{centre}</center></{name}>"
        for name, (last, centre) in limits.items()
    )
    labels = "".join(
        f"<coilLabel><coilNumber>{number}</coilNumber><coilName>SIM{number:03d}</coilName></coilLabel>"
        for number in range(settings.coils)
    )
    return f"""<?xml version="1.0" encoding="UTF-8"?>
<ismrmrdHeader xmlns="http://www.ismrm.org/ISMRMRD">
<measurementInformation><measurementID>simulation</measurementID><patientPosition>HFS</patientPosition>
<protocolName>voxelsigma simulation</protocolName></measurementInformation>
<acquisitionSystemInformation><systemVendor>voxelsigma</systemVendor>
<relativeReceiverNoiseBandwidth>{BANDWIDTH}</relativeReceiverNoiseBandwidth>
<receiverChannels>{settings.coils}</receiverChannels>{labels}</acquisitionSystemInformation>
<experimentalConditions><H1resonanceFrequency_Hz>123200000</H1resonanceFrequency_Hz></experimentalConditions>
<encoding>
<encodedSpace><matrixSize><x>{wide}</x><y>{rows}</y><z>{depth}</z></matrixSize>
<fieldOfView_mm><x>{FIELD_OF_VIEW_MM * settings.oversampling}</x><y>{FIELD_OF_VIEW_MM}</y><z>{thickness}</z>
</fieldOfView_mm></encodedSpace>
<reconSpace><matrixSize><x>{columns}</x><y>{rows}</y><z>{depth}</z></matrixSize>
<fieldOfView_mm><x>{FIELD_OF_VIEW_MM}</x><y>{FIELD_OF_VIEW_MM}</y><z>{thickness}</z></fieldOfView_mm></reconSpace>
<encodingLimits>{limits_xml}</encodingLimits>
<trajectory>cartesian</trajectory>
<parallelImaging><accelerationFactor><kspace_encoding_step_1>{factors[0]}</kspace_encoding_step_1>
<kspace_encoding_step_2>{factors[1]}</kspace_encoding_step_2></accelerationFactor>
<calibrationMode>embedded</calibrationMode></parallelImaging>
</encoding>
<sequenceParameters><TR>500</TR><TE>10</TE></sequenceParameters>
</ismrmrdHeader>
""".encode()
