"""Random images of head slices: contrast, texture, blur, size, place and phase."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from voxelsigma.formats.masks import Mask
from voxelsigma.training.volumes import Volume

_ATTEMPTS = 20
# A voxel belongs to the object above this fraction of the brightest percentile.
_OBJECT_THRESHOLD = 0.1


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


def draw_magnitude(
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


def draw_phase(shape: tuple[int, int], rng: np.random.Generator) -> NDArray[np.complex64]:
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


def dilated_support(magnitude: NDArray[np.float32], margin: int, *, least: float = 0.0) -> Mask:
    """The object without holes, `margin` voxels wider; it is what lies above 2 % of the 99th percentile and `least`."""
    filled = ndimage.binary_fill_holes(magnitude > max(0.02 * np.percentile(magnitude, 99), least))
    return np.asarray(ndimage.binary_dilation(filled, iterations=margin))
