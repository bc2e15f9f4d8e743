"""A head-like numerical phantom: ellipsoids for skull, brain, ventricles and lesions, and fine texture."""

from typing import Final

import numpy as np
import numpy.typing as npt

# intensity, half axes (z, y, x), centre (z, y, x), rotation in the (y, x) plane in degrees; in half fields of view
_ELLIPSOIDS: Final = (
    (0.95, (0.90, 0.92, 0.72), (0.00, 0.00, 0.00), 0.0),
    (-0.75, (0.86, 0.87, 0.67), (0.00, 0.00, 0.00), 0.0),
    (0.45, (0.82, 0.83, 0.63), (0.00, -0.01, 0.00), 0.0),
    (-0.16, (0.62, 0.62, 0.46), (0.00, -0.02, 0.00), 0.0),
    (0.35, (0.35, 0.31, 0.10), (0.05, 0.00, 0.17), -18.0),
    (0.35, (0.35, 0.31, 0.12), (0.05, 0.00, -0.17), 18.0),
    (0.10, (0.30, 0.19, 0.19), (0.00, 0.38, 0.00), 0.0),
    (-0.15, (0.25, 0.05, 0.05), (0.10, 0.10, 0.42), 0.0),
    (0.30, (0.20, 0.06, 0.04), (-0.05, -0.52, 0.30), 30.0),
    (0.25, (0.15, 0.03, 0.03), (0.05, -0.36, -0.25), 0.0),
    (-0.20, (0.15, 0.04, 0.07), (0.00, 0.58, -0.18), 0.0),
    (0.22, (0.10, 0.02, 0.02), (0.00, -0.12, 0.45), 0.0),
)


def head_phantom(z: npt.ArrayLike, y: npt.ArrayLike, x: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Intensity of the phantom at positions in half fields of view, -1 to 1 on each axis.

    Parameters
    ----------
    z, y, x
        Positions, broadcastable against each other.

    Returns
    -------
        Intensity, 0 outside the head, about 0.5 in the brain.
    """
    depth, row, column = np.broadcast_arrays(*(np.asarray(axis, dtype=np.float64) for axis in (z, y, x)))
    image = np.zeros(depth.shape)
    for intensity, axes, centre, degrees in _ELLIPSOIDS:
        turn = np.deg2rad(degrees)
        dy, dx = row - centre[1], column - centre[2]
        along, across = np.cos(turn) * dy - np.sin(turn) * dx, np.sin(turn) * dy + np.cos(turn) * dx
        radius = ((depth - centre[0]) / axes[0]) ** 2 + (along / axes[1]) ** 2 + (across / axes[2]) ** 2
        image += intensity * (radius <= 1)
    # gyri: a texture that fills the outer brain, so that there is detail to lose
    ring = np.sqrt((row / 0.83) ** 2 + (column / 0.63) ** 2)
    folds = np.sin(26 * ring + 3 * np.sin(9 * np.arctan2(row, column)) + 4 * depth)
    cortex = (ring > 0.72) & (ring < 0.99) & (image > 0.3)
    image = np.where(cortex, image + 0.10 * folds, image)
    return np.maximum(image, 0)
