"""Streams of simulated scans to train on: every example is drawn anew from a seed.

A slice of a head becomes an image of random contrast, texture, blur, size, place and phase; random coils see it;
a random mask samples it; whitened noise is added. Nothing is stored.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from voxelsigma.formats.coils import coil_sensitivities, unit_norm
from voxelsigma.formats.masks import Kind, Mask, make_mask
from voxelsigma.models.encoding import SenseEncoding
from voxelsigma.training.volumes import Volume

Sizes = tuple[int, int, int]

_ATTEMPTS = 20
# A voxel belongs to the object above this fraction of the brightest percentile.
_OBJECT_THRESHOLD = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class ExampleSettings:
    """What examples are drawn from; every range includes both ends.

    Parameters
    ----------
    matrix
        Range of the number of voxels along y and, independently, along x; multiples of 4.
    coils
        Range of the number of coils.
    many_coils
        Number of coils of the share `many_coils_share` of the examples.
    many_coils_share
        See `many_coils`; 0 to 1.
    kinds
        Masks, each equally often.
    acceleration
        Range of the acceleration R, drawn log-uniformly, whole numbers for `uniform_1d`.
    centre
        Width of the fully sampled centre; by default random, up to 0.15 of the axis and within the budget.
        `uniform_1d` gets that many reference lines in 7 of 10 examples, in addition to its own.
    snr
        Range of the mean object magnitude of the fully sampled image in units of the noise's standard
        deviation per real component, drawn log-uniformly.
    support_share
        Share of the examples whose sensitivities are 0 outside the dilated object; 0 to 1.
    intensity_share
        Share of the examples cut from intensity volumes rather than label maps, where there are both; 0 to 1.
    """

    matrix: tuple[int, int] = (96, 144)
    coils: tuple[int, int] = (4, 16)
    many_coils: int = 32
    many_coils_share: float = 0.04
    kinds: tuple[Kind, ...] = ("uniform_1d", "random_1d", "random_2d", "poisson_disc")
    acceleration: tuple[float, float] = (2.0, 8.0)
    centre: int | None = None
    snr: tuple[float, float] = (5.0, 50.0)
    support_share: float = 0.5
    intensity_share: float = 0.25

    def __post_init__(self) -> None:
        for name in ("matrix", "coils", "acceleration", "snr"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"examples: {name} must be a range of positive numbers, got {(low, high)}")
        if not self.kinds:
            raise ValueError("examples: kinds must name at least one mask, got none")


@dataclass(frozen=True, slots=True)
class Example:
    """One simulated scan, or a batch of them with a leading axis `batch`.

    Parameters
    ----------
    kspace
        Noisy, sampled k-space, shape `(coils, k1, k0)`, complex64, noise of variance 2 (1 per real component).
    sensitivities
        Coil sensitivities, shape `(coils, y, x)`, complex64, unit norm (or 0 outside the object).
    mask
        Sampled positions, shape `(1, k1, k0)`, float32, 1 where sampled.
    target
        The image without noise, shape `(y, x)`, complex64, in SNR units.
    """

    kspace: Tensor
    sensitivities: Tensor
    mask: Tensor
    target: Tensor


def draw_sizes(settings: ExampleSettings, rng: np.random.Generator) -> Sizes:
    """Draw what the examples of a batch share: the number of coils and the two axes of the matrix."""
    low, high = settings.matrix
    y, x = (low + 4 * int(n) for n in rng.integers(0, (high - low) // 4 + 1, 2))
    many = rng.random() < settings.many_coils_share
    coils = settings.many_coils if many else int(rng.integers(settings.coils[0], settings.coils[1] + 1))
    return coils, y, x


def draw_example(
    volumes: Sequence[Volume], settings: ExampleSettings, sizes: Sizes, rng: np.random.Generator
) -> Example:
    r"""Draw one example.

    .. math:: y = M (F S \rho + n), \qquad n \sim \mathcal{CN}(0, 2)

    Parameters
    ----------
    volumes
        Heads to cut slices from.
    settings
        Ranges to draw from.
    sizes
        Coils and matrix `(coils, y, x)`.
    rng
        Source of all randomness.

    Returns
    -------
        The example, without batch axis.

    Raises
    ------
    ValueError
        There are no volumes, or they are (nearly) empty.
    """
    coils, shape = sizes[0], sizes[1:]
    magnitude = _draw_magnitude(volumes, shape, settings.intensity_share, rng)
    sensitivities = _draw_sensitivities(coils, shape, rng)
    if rng.random() < settings.support_share:
        sensitivities = sensitivities * _dilated_support(magnitude, int(rng.integers(2, 7)))
    target = scale_to_snr(magnitude, _log_uniform(settings.snr, rng)) * _draw_phase(shape, rng)
    mask = _draw_mask(shape, settings, rng)
    noise = rng.standard_normal((*sensitivities.shape, 2), dtype=np.float32)
    return simulate(target, sensitivities, mask, noise)


def stream(volumes: Sequence[Volume], settings: ExampleSettings, *, batch: int, seed: int) -> Iterator[Example]:
    """Yield batches without end; batch number i depends on the seed and i alone.

    The examples of a batch share their matrix and their number of coils.
    """
    number = 0
    while True:
        rng = np.random.default_rng([seed, number])
        sizes = draw_sizes(settings, rng)
        yield collate([draw_example(volumes, settings, sizes, rng) for _ in range(batch)])
        number += 1


def collate(examples: Sequence[Example]) -> Example:
    """Stack examples of equal sizes along a new first axis."""
    return Example(
        kspace=torch.stack([example.kspace for example in examples]),
        sensitivities=torch.stack([example.sensitivities for example in examples]),
        mask=torch.stack([example.mask for example in examples]),
        target=torch.stack([example.target for example in examples]),
    )


def simulate(
    target: NDArray[np.complex64],
    sensitivities: NDArray[np.complex64],
    mask: Mask,
    noise: NDArray[np.float32],
) -> Example:
    """Encode an image `(y, x)` and add noise `(coils, k1, k0, 2)` of variance 1 per real component."""
    image = torch.from_numpy(target.astype(np.complex64))
    maps = torch.from_numpy(sensitivities)
    sampled = torch.from_numpy(mask[None].astype(np.float32))
    kspace = SenseEncoding(maps, sampled).forward(image)
    kspace = kspace + sampled * torch.view_as_complex(torch.from_numpy(noise))
    return Example(kspace=kspace, sensitivities=maps, mask=sampled, target=image)


def object_voxels(magnitude: NDArray[np.floating]) -> Mask:
    """Voxels above 10 % of the 99th percentile of the magnitude."""
    return np.asarray(magnitude > _OBJECT_THRESHOLD * np.percentile(magnitude, 99))


def scale_to_snr(magnitude: NDArray[np.float32], snr: float) -> NDArray[np.float32]:
    """Scale so that the mean magnitude over the object is `snr`.

    Raises
    ------
    ValueError
        The image is empty.
    """
    inside = object_voxels(magnitude)
    if not inside.any():
        raise ValueError("examples: the image is empty; expected an object to scale to an SNR")
    return (magnitude * (snr / magnitude[inside].mean())).astype(np.float32)


def _draw_magnitude(
    volumes: Sequence[Volume], shape: tuple[int, int], intensity_share: float, rng: np.random.Generator
) -> NDArray[np.float32]:
    """A head slice on the matrix, object at least 5 % of it."""
    for _ in range(_ATTEMPTS):
        volume = _draw_volume(volumes, intensity_share, rng)
        axis = int(rng.integers(3))
        extent = volume.values.shape[axis]
        cut = volume.values.take(int(extent * rng.uniform(0.08, 0.92)), axis=axis)
        if np.count_nonzero(cut) < 0.05 * cut.size:
            continue
        image = _onto_matrix(_contrast(cut, volume.labels, rng), shape, rng)
        if image.max() > 0 and object_voxels(image).mean() > 0.05:
            return np.asarray(image)
    raise ValueError(f"examples: {_ATTEMPTS} slices in a row were nearly empty; expected volumes of heads")


def _draw_volume(volumes: Sequence[Volume], intensity_share: float, rng: np.random.Generator) -> Volume:
    labelled = [volume for volume in volumes if volume.labels]
    plain = [volume for volume in volumes if not volume.labels]
    pool = plain if plain and (not labelled or rng.random() < intensity_share) else labelled
    if not pool:
        raise ValueError("examples: there are no volumes to draw from; expected at least one")
    return pool[rng.integers(len(pool))]


def _contrast(cut: NDArray[np.integer], labels: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """Random intensity, texture and bias field of a slice: of its labels, or of its own intensities."""
    if labels:
        intensity = rng.uniform(0.05, 1, labels).astype(np.float32)
        texture = rng.uniform(0, 0.08, labels).astype(np.float32)
        # air is empty, and so are a few labels
        intensity[rng.random(labels) < 0.05] = 0.01
        intensity[0] = texture[0] = 0
        grain = ndimage.gaussian_filter(rng.standard_normal(cut.shape, dtype=np.float32), rng.uniform(0.4, 2))
        image = intensity[cut] * (1 + texture[cut] * grain / grain.std())
    else:
        image = (cut / max(float(np.percentile(cut, 99)), 1)) ** rng.uniform(0.6, 1.5)
    bias = np.exp(rng.uniform(0, 0.3) * _smooth_field(image.shape, rng))
    return np.asarray(np.maximum(image * bias, 0), dtype=np.float32)


def _onto_matrix(image: NDArray[np.float32], shape: tuple[int, int], rng: np.random.Generator) -> NDArray[np.float32]:
    """Turn, scale, move and blur a slice onto the matrix; what is outside the slice is 0."""
    image = np.rot90(image, int(rng.integers(4)))
    if rng.random() < 0.5:
        image = image[:, ::-1]
    # source voxels per matrix voxel: the head fills 0.75 to 1.2 of the field of view
    fill = rng.uniform(0.75, 1.2)
    step = max(image.shape[0] / shape[0], image.shape[1] / shape[1]) / fill * rng.uniform(0.95, 1.05, 2)
    blurred = ndimage.gaussian_filter(image, np.maximum(step * rng.uniform(0.3, 0.7), 0.3))
    angle = rng.uniform(-0.3, 0.3)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) * step
    middle = (np.array(image.shape) - 1) / 2 + rng.normal(0, 0.03, 2) * np.array(image.shape)
    offset = middle - turn @ ((np.array(shape) - 1) / 2)
    return np.asarray(ndimage.affine_transform(blurred, turn, offset, output_shape=shape, order=1))


def _draw_phase(shape: tuple[int, int], rng: np.random.Generator) -> NDArray[np.complex64]:
    """A smooth phase: constant, linear and a few periods of variation."""
    y, x = (np.linspace(-1, 1, n, dtype=np.float32) for n in shape)
    slope = rng.normal(0, 1.0, 2)
    phase = slope[0] * y[:, None] + slope[1] * x + rng.uniform(0, np.pi / 2) * _smooth_field(shape, rng)
    return np.asarray(np.exp(1j * (phase + rng.uniform(0, 2 * np.pi))), dtype=np.complex64)


def _smooth_field(shape: tuple[int, ...], rng: np.random.Generator) -> NDArray[np.float32]:
    """Random field of unit variance at 3 x 3 to 6 x 6 nodes, interpolated by cubic splines."""
    nodes = rng.standard_normal((int(rng.integers(3, 7)),) * 2)
    axes = [np.linspace(0, n - 1, m) for n, m in zip(nodes.shape, shape, strict=True)]
    places = np.meshgrid(*axes, indexing="ij")
    return np.asarray(ndimage.map_coordinates(nodes, places, order=3, mode="nearest"), dtype=np.float32)


def _draw_sensitivities(coils: int, shape: tuple[int, int], rng: np.random.Generator) -> NDArray[np.complex64]:
    """Unit-norm maps of an array that is up to a third larger than the field of view and not centred on it."""
    around = [int(n * rng.uniform(1, 1.33)) for n in shape]
    first = [int(rng.integers(0, m - n + 1)) for m, n in zip(around, shape, strict=True)]
    maps = coil_sensitivities(coils, (around[0], around[1]), rng=rng)
    return unit_norm(maps[:, first[0] : first[0] + shape[0], first[1] : first[1] + shape[1]])


def _dilated_support(magnitude: NDArray[np.float32], margin: int) -> Mask:
    """The object without holes, `margin` voxels wider."""
    filled = ndimage.binary_fill_holes(magnitude > 0.02 * np.percentile(magnitude, 99))
    return np.asarray(ndimage.binary_dilation(filled, iterations=margin))


def _draw_mask(shape: tuple[int, int], settings: ExampleSettings, rng: np.random.Generator) -> Mask:
    kind = settings.kinds[rng.integers(len(settings.kinds))]
    acceleration = _log_uniform(settings.acceleration, rng)
    if kind == "uniform_1d":
        acceleration = round(acceleration)
        mask = make_mask(kind, shape, acceleration, centre=0, rng=rng)
        if rng.random() < 0.7:
            width = settings.centre or int(rng.integers(8, 1 + max(8, int(0.2 * shape[0]))))
            mask[shape[0] // 2 - width // 2 : shape[0] // 2 - width // 2 + width] = True
        return mask
    if kind == "random_1d":
        most = min(0.8 * shape[0] / acceleration, 0.15 * shape[0])
    else:
        most = min(np.sqrt(0.6 * shape[0] * shape[1] / acceleration), 0.15 * min(shape))
    centre = int(rng.integers(min(4, int(most)), int(most) + 1)) if settings.centre is None else settings.centre
    return make_mask(kind, shape, acceleration, centre=centre, rng=rng)


def _log_uniform(limits: tuple[float, float], rng: np.random.Generator) -> float:
    return float(np.exp(rng.uniform(np.log(limits[0]), np.log(limits[1]))))
