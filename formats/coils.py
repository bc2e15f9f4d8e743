"""Receive coils for simulation: fields of circular loops around the field of view, and their noise."""

import numpy as np
from numpy.typing import NDArray
from scipy.special import ellipe, ellipkm1

_MOST_COILS = 128
_COILS_PER_RING = 16
# Lengths are in units of the largest extent of the field of view.
_RING_RADIUS = 0.65
_RING_SPACING = 0.3
# Half the thickness of the conductor: keeps the field finite where a loop cuts a corner of the field of view.
_CONDUCTOR = 0.06


def coil_sensitivities(
    coils: int, shape: tuple[int, ...], *, rng: np.random.Generator | None = None
) -> NDArray[np.complex64]:
    r"""Receive fields of circular loops on one or several rings around the field of view.

    By reciprocity the sensitivity of a coil is the field that unit current in it would make, seen by
    counter-rotating spins:

    .. math:: S_c = B_x - i B_y

    with the main field along z (Hoult, Concepts Magn Reson 2000). Each loop's field is its exact Biot-Savart
    field in complete elliptic integrals (Smythe, Static and Dynamic Electricity, 1968, section 7.10),
    softened by a conductor of finite thickness. Voxels are taken as isotropic. A 2D field of
    view is the plane z = 0.

    Parameters
    ----------
    coils
        Number of coils, 1 to 128. Up to 16 share one ring (in 3D up to 8); neighbouring rings are staggered.
    shape
        `(y, x)` or `(z, y, x)`.
    rng
        Moves, turns and resizes the loops by a few per cent and gives each coil a random phase; without it
        the array is regular.

    Returns
    -------
        Sensitivities, shape `(coils, y, x)` or `(coils, z, y, x)`, complex64, scaled so that the
        root sum of squares is 1 at the centre of the field of view.

    Raises
    ------
    ValueError
        The number of coils or the shape is not valid.
    """
    if not 1 <= coils <= _MOST_COILS:
        raise ValueError(f"coils must be from 1 to {_MOST_COILS}, got {coils}")
    if len(shape) not in {2, 3} or min(shape) < 1:
        raise ValueError(f"shape of coil sensitivities must be (y, x) or (z, y, x), got {tuple(shape)}")
    centres, radii, phases = _array(coils, volumetric=len(shape) == 3)
    if rng is not None:
        centres = centres + rng.normal(0, 0.02, centres.shape)
        radii = radii * rng.uniform(0.9, 1.1, coils)
        phases = rng.uniform(0, 2 * np.pi, coils)
    axes = _inward_axes(centres)
    if rng is not None:
        axes = _unit(axes + rng.normal(0, 0.1, axes.shape))
    points = _grid(shape)
    origin = np.zeros((1, 3))
    at_centre = [_received(origin, *loop)[0] for loop in zip(centres, axes, radii, strict=True)]
    scale = np.exp(1j * phases) / np.linalg.norm(at_centre)
    fields = np.empty((coils, points.shape[0]), dtype=np.complex64)
    for coil, loop in enumerate(zip(centres, axes, radii, strict=True)):
        fields[coil] = scale[coil] * _received(points, *loop)
    return fields.reshape(coils, *shape)


def unit_norm(sensitivities: NDArray[np.complex64]) -> NDArray[np.complex64]:
    r"""Divide sensitivities by their root sum of squares: :math:`\sum_c |S_c|^2 = 1`.

    Parameters
    ----------
    sensitivities
        Shape `(coils, ...)`, complex.

    Returns
    -------
        Same shape and dtype; voxels that no coil sees stay 0.
    """
    norm = np.sqrt(np.sum(np.abs(sensitivities) ** 2, axis=0, dtype=np.float64))
    weights = np.divide(1, norm, out=np.zeros_like(norm), where=norm > 0)
    return (sensitivities * weights).astype(sensitivities.dtype)


def random_noise_covariance(
    coils: int, *, correlation: float = 0.3, spread: float = 0.3, rng: np.random.Generator
) -> NDArray[np.complex64]:
    r"""Random coil noise covariance, as of coils numbered around a ring.

    .. math:: \Psi_{ij} = s_i s_j \, r^{d_{ij}} \, e^{i(\varphi_i - \varphi_j)}

    with the distance :math:`d_{ij} = \min(|i-j|, C - |i-j|)`, random phases, and standard deviations
    :math:`s_i` log-normal around 1. An exponential of the distance on a circle is positive definite.

    Parameters
    ----------
    coils
        Number of coils C, at least 1.
    correlation
        r, magnitude of the correlation of neighbours, 0 up to but not including 1.
    spread
        Standard deviation of the logarithm of the variances, at least 0.
    rng
        Source of randomness.

    Returns
    -------
        Covariance `E[n nᴴ]`, shape `(coils, coils)`, complex64, Hermitian, positive definite.

    Raises
    ------
    ValueError
        A value is out of range.
    """
    if coils < 1:
        raise ValueError(f"coils must be at least 1, got {coils}")
    if not 0 <= correlation < 1:
        raise ValueError(f"correlation must be at least 0 and below 1, got {correlation}")
    if spread < 0:
        raise ValueError(f"spread must be at least 0, got {spread}")
    steps = np.abs(np.subtract.outer(np.arange(coils), np.arange(coils)))
    correlations = np.power(float(correlation), np.minimum(steps, coils - steps))
    deviations = np.exp(rng.normal(0, spread / 2, coils) + 1j * rng.uniform(0, 2 * np.pi, coils))
    covariance = correlations * np.outer(deviations, deviations.conj())
    return np.asarray((covariance + covariance.conj().T) / 2, dtype=np.complex64)


def _array(coils: int, *, volumetric: bool) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Regular array: loop centres `(coils, 3)` as (x, y, z), loop radii and phases `(coils,)`."""
    per_ring = _COILS_PER_RING // 2 if volumetric else _COILS_PER_RING
    rings = -(-coils // per_ring)
    # in 3D the rings share the extent of the volume, in 2D they stand beside the slice
    spacing = min(_RING_SPACING, 0.9 / rings) if volumetric else min(_RING_SPACING, 1.2 / rings)
    centres, radii = [], []
    for ring, members in enumerate(np.array_split(np.arange(coils), rings)):
        count = len(members)
        angles = 2 * np.pi * (np.arange(count) + ring / rings) / count
        height = np.full(count, (ring - (rings - 1) / 2) * spacing)
        centres.append(np.stack([_RING_RADIUS * np.cos(angles), _RING_RADIUS * np.sin(angles), height], axis=1))
        # neighbours overlap slightly
        radii.append(np.full(count, np.clip(0.55 * 2 * np.pi * _RING_RADIUS / count, 0.12, 0.45)))
    return np.concatenate(centres), np.concatenate(radii), np.zeros(coils)


def _received(
    points: NDArray[np.float64], centre: NDArray[np.float64], axis: NDArray[np.float64], radius: float
) -> NDArray[np.complex128]:
    """Bx - iBy of one loop of unit current at points `(n, 3)`."""
    offsets = points - centre
    height = offsets @ axis
    across = offsets - height[:, None] * axis
    distance = np.maximum(np.linalg.norm(across, axis=1), 1e-9)
    along, outward = _loop_field(distance, height, radius)
    transverse = axis[0] - 1j * axis[1]
    return np.asarray(along * transverse + outward / distance * (across[:, 0] - 1j * across[:, 1]))


def _loop_field(
    distance: NDArray[np.float64], height: NDArray[np.float64], radius: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Axial and radial field of a loop at a distance from its axis and a height above its plane."""
    squares = distance**2 + height**2 + _CONDUCTOR**2
    near = radius**2 + squares - 2 * radius * distance
    far = radius**2 + squares + 2 * radius * distance
    # the complementary parameter near/far keeps its digits close to the conductor
    first, second = ellipkm1(near / far), ellipe(1 - near / far)
    common = 1 / (2 * near * np.sqrt(far))
    axial = common * ((radius**2 - squares) * second + near * first)
    radial = common * height / distance * ((radius**2 + squares) * second - near * first)
    return axial, radial


def _inward_axes(centres: NDArray[np.float64]) -> NDArray[np.float64]:
    """Unit vectors `(coils, 3)` from the loops towards the z axis."""
    return _unit(-centres * np.array([1.0, 1.0, 0.0]))


def _unit(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))


def _grid(shape: tuple[int, ...]) -> NDArray[np.float64]:
    """Voxel positions `(voxels, 3)` as (x, y, z), 0 at index n//2, in units of the largest extent."""
    volume = (1, *shape) if len(shape) == 2 else shape
    axes = [(np.arange(n) - n // 2) / max(shape) for n in volume]
    z, y, x = np.meshgrid(*axes, indexing="ij")
    return np.stack([x.ravel(), y.ravel(), z.ravel()], axis=1)
