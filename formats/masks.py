"""Sampling masks of Cartesian k-space: regular, random and Poisson-disc.

A mask is a boolean array over the plane of the two phase encodings, or of phase encoding and readout, true
where sampled. One-dimensional patterns vary along axis 0 and are constant along axis 1. The centre of k-space
is index `n // 2` of an axis of `n`, as in the centred Fourier transform. Randomness comes only from the
generator that is passed.
"""

from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]
Kind = Literal["uniform_1d", "random_1d", "random_2d", "poisson_disc"]

# Poisson-disc: the minimum distance at radius 1 (the middle of an edge) is 1 + this times that at the centre.
_DISTANCE_GROWTH = 2.0
# Poisson-disc: the search stops when at most this fraction of the samples is surplus and must be thinned out.
_SURPLUS = 0.03
_SEARCH_STEPS = 12


def make_mask(
    kind: Kind, shape: tuple[int, int], acceleration: float, *, centre: int, rng: np.random.Generator
) -> Mask:
    """Make a mask of a named kind.

    Parameters
    ----------
    kind
        `uniform_1d`, `random_1d`, `random_2d` or `poisson_disc`.
    shape
        Shape of the plane `(ka, kb)`.
    acceleration
        Positions of the plane over sampled positions, at least 1.
    centre
        Width of the fully sampled centre: lines for `random_1d`, the side of a square for the 2D kinds.
        `uniform_1d` has none and ignores it.
    rng
        Source of randomness; `uniform_1d` draws nothing.

    Returns
    -------
        Mask, shape `(ka, kb)`, boolean.

    Raises
    ------
    ValueError
        The kind is unknown, or its own function refuses the values.
    """
    if kind == "uniform_1d":
        return uniform_1d(shape, acceleration)
    if kind == "random_1d":
        return random_1d(shape, acceleration, centre_lines=centre, rng=rng)
    if kind == "random_2d":
        return random_2d(shape, acceleration, centre=centre, rng=rng)
    if kind == "poisson_disc":
        return poisson_disc(shape, acceleration, centre=centre, rng=rng)
    raise ValueError(f"mask kind must be one of {', '.join(get_args(Kind))}, got {kind!r}")


def uniform_1d(shape: tuple[int, int], acceleration: float, *, offset: int | None = None) -> Mask:
    r"""Every R-th line: rows :math:`o, o + R, o + 2R, \dots`, without reference lines.

    Parameters
    ----------
    shape
        Shape of the plane `(ka, kb)`.
    acceleration
        R, a whole number from 1 to `ka`.
    offset
        First sampled row, from 0 to R-1. By default the rows pass through the centre `ka // 2`.

    Returns
    -------
        Mask, shape `(ka, kb)`, boolean.

    Raises
    ------
    ValueError
        The shape is empty, or acceleration or offset is out of range.
    """
    lines, samples = _checked_shape(shape)
    _check_acceleration(acceleration, lines, "lines")
    if acceleration != int(acceleration):
        raise ValueError(f"acceleration of a uniform mask must be a whole number, got {acceleration}")
    step = int(acceleration)
    first = (lines // 2) % step if offset is None else offset
    if not 0 <= first < step:
        raise ValueError(f"offset must be from 0 to {step - 1} at acceleration {step}, got {offset}")
    return _rows(np.arange(lines) % step == first, samples)


def random_1d(shape: tuple[int, int], acceleration: float, *, centre_lines: int, rng: np.random.Generator) -> Mask:
    r"""Fully sampled centre lines and random lines whose density falls with the distance from the centre.

    The number of lines is :math:`\mathrm{round}(k_a / R)`. Those outside the centre are drawn without
    replacement with weights :math:`(1 - |\kappa|)^2 + 0.05`, :math:`|\kappa|` being 1 at the edge.

    Parameters
    ----------
    shape
        Shape of the plane `(ka, kb)`.
    acceleration
        R, from 1 to `ka`.
    centre_lines
        Fully sampled lines in the centre, at most the number of lines.
    rng
        Source of randomness.

    Returns
    -------
        Mask, shape `(ka, kb)`, boolean.

    Raises
    ------
    ValueError
        The shape is empty, the acceleration is out of range, or the centre does not fit.
    """
    lines, samples = _checked_shape(shape)
    _check_acceleration(acceleration, lines, "lines")
    budget = round(lines / acceleration)
    _check_centre(centre_lines, lines)
    if centre_lines > budget:
        raise ValueError(
            f"centre must be at most the {budget} lines of acceleration {acceleration} over {lines}, got {centre_lines}"
        )
    sampled = _centre_of(lines, centre_lines)
    others = np.flatnonzero(~sampled)
    distance = np.abs(others - lines // 2) / (lines / 2)
    weights = (1 - distance) ** 2 + 0.05
    chosen = rng.choice(others, budget - centre_lines, replace=False, p=weights / weights.sum())
    sampled[chosen] = True
    return _rows(sampled, samples)


def random_2d(shape: tuple[int, int], acceleration: float, *, centre: int, rng: np.random.Generator) -> Mask:
    r"""A fully sampled central square and uniformly random positions around it.

    The number of samples is :math:`\mathrm{round}(k_a k_b / R)`.

    Parameters
    ----------
    shape
        Shape of the plane `(ka, kb)`.
    acceleration
        R, from 1 to `ka * kb`.
    centre
        Side of the fully sampled square.
    rng
        Source of randomness.

    Returns
    -------
        Mask, shape `(ka, kb)`, boolean.

    Raises
    ------
    ValueError
        The shape is empty, the acceleration is out of range, or the centre does not fit.
    """
    mask, budget = _square_and_budget(shape, acceleration, centre)
    others = np.flatnonzero(~mask)
    mask.flat[rng.choice(others, budget - centre * centre, replace=False)] = True
    return mask


def poisson_disc(shape: tuple[int, int], acceleration: float, *, centre: int, rng: np.random.Generator) -> Mask:
    r"""A fully sampled central square inside a variable-density Poisson-disc pattern.

    Outside the square two samples are at least
    :math:`d(\kappa) = s \, (1 + 2 |\kappa|)` positions apart, taken at the one of them nearer to the centre,
    with :math:`|\kappa| = 1` in the middle of an edge. Positions are tried in one random order and kept
    where no earlier one is too near; the scale :math:`s` is found by bisection, and the few surplus samples
    are removed at random, which keeps the distances. The number of samples is
    :math:`\mathrm{round}(k_a k_b / R)`.

    Parameters
    ----------
    shape
        Shape of the plane `(ka, kb)`.
    acceleration
        R, from 1 to `ka * kb`.
    centre
        Side of the fully sampled square.
    rng
        Source of randomness.

    Returns
    -------
        Mask, shape `(ka, kb)`, boolean.

    Raises
    ------
    ValueError
        The shape is empty, the acceleration is out of range, or the centre does not fit.
    """
    mask, budget = _square_and_budget(shape, acceleration, centre)
    wanted = budget - centre * centre
    order = rng.permutation(np.flatnonzero(~mask))
    growth = 1 + _DISTANCE_GROWTH * _radius(mask.shape)
    chosen = _poisson_disc_of(order, growth, wanted)
    # in the order of acceptance the last ones fill the dense regions: thin out evenly
    mask.flat[rng.permutation(chosen)[:wanted]] = True
    return mask


def _poisson_disc_of(order: NDArray[np.intp], growth: NDArray[np.float64], wanted: int) -> NDArray[np.intp]:
    """Positions of the widest Poisson-disc pattern found that has at least `wanted` of them."""
    narrow, wide = 0.0, float(np.sqrt(growth.size))
    best = order
    # the number of samples goes as 1 / s^2: this first guess saves most of the bisection
    scale = 0.8 * float(np.sqrt(np.sum(1 / growth**2) / max(wanted, 1)))
    for _ in range(_SEARCH_STEPS):
        chosen = _throw_darts(order, scale * growth)
        if chosen.size >= wanted:
            best, narrow = (chosen, scale) if chosen.size <= best.size else (best, scale)
        else:
            wide = scale
        if wanted <= best.size <= (1 + _SURPLUS) * wanted:
            break
        guess = scale * float(np.sqrt(chosen.size / max(1.01 * wanted, 1)))
        scale = guess if narrow < guess < wide else (narrow + wide) / 2
    return best


def _throw_darts(order: NDArray[np.intp], distance: NDArray[np.float64]) -> NDArray[np.intp]:
    """Flat positions, in the given order, that no earlier one forbids by its minimum distance."""
    # on the grid squared distances are whole: d^2 < r^2 is d^2 <= ceil(r^2) - 1
    reach = np.maximum(np.ceil(distance**2).astype(np.int64) - 1, 0)
    reach = np.minimum(reach, sum(n * n for n in distance.shape))
    margin = int(np.sqrt(reach.max()))
    forbidden = np.zeros([n + 2 * margin for n in distance.shape], dtype=bool)
    discs: dict[int, Mask] = {}
    chosen = []
    rows, columns = np.divmod(order, distance.shape[1])
    reaches = reach.flat[order].tolist()
    for index, (row, column, square) in enumerate(zip(rows.tolist(), columns.tolist(), reaches, strict=True)):
        if forbidden[row + margin, column + margin]:
            continue
        chosen.append(index)
        if square not in discs:
            discs[square] = _disc(square)
        disc = discs[square]
        top, left = row + margin - disc.shape[0] // 2, column + margin - disc.shape[1] // 2
        forbidden[top : top + disc.shape[0], left : left + disc.shape[1]] |= disc
    return order[chosen]


def _disc(squared_radius: int) -> Mask:
    """Disc of grid points with squared distance at most `squared_radius` from the middle one."""
    half = int(np.sqrt(squared_radius))
    offsets = np.arange(-half, half + 1)
    return np.asarray(offsets[:, None] ** 2 + offsets**2 <= squared_radius)


def _radius(shape: tuple[int, ...]) -> NDArray[np.float64]:
    """Distance of every position from the centre of k-space, 1 in the middle of an edge."""
    axes = [(np.arange(n) - n // 2) / (n / 2) for n in shape]
    return np.asarray(np.hypot(axes[0][:, None], axes[1]))


def _centre_of(length: int, width: int) -> Mask:
    """A band of `width` positions around the centre of an axis."""
    start = length // 2 - width // 2
    positions = np.arange(length)
    return (positions >= start) & (positions < start + width)


def _rows(sampled: Mask, samples: int) -> Mask:
    """Repeat a one-dimensional pattern along axis 1."""
    return np.repeat(sampled[:, None], samples, axis=1)


def _square_and_budget(shape: tuple[int, int], acceleration: float, centre: int) -> tuple[Mask, int]:
    """A mask with only the central square sampled, and the number of samples that the acceleration allows."""
    lines, samples = _checked_shape(shape)
    _check_acceleration(acceleration, lines * samples, "positions")
    _check_centre(centre, min(lines, samples))
    budget = round(lines * samples / acceleration)
    if centre * centre > budget:
        raise ValueError(
            f"centre squared must be at most the {budget} positions of acceleration {acceleration} over "
            f"{lines} x {samples}, got {centre} x {centre}"
        )
    return _centre_of(lines, centre)[:, None] & _centre_of(samples, centre), budget


def _checked_shape(shape: tuple[int, int]) -> tuple[int, int]:
    if len(shape) != 2 or min(shape) < 1:
        raise ValueError(f"shape of a mask must be two positive numbers (ka, kb), got {tuple(shape)}")
    return shape[0], shape[1]


def _check_acceleration(acceleration: float, most: int, what: str) -> None:
    if not 1 <= acceleration <= most:
        raise ValueError(f"acceleration must be from 1 to {most} for {most} {what}, got {acceleration}")


def _check_centre(centre: int, most: int) -> None:
    if not 0 <= centre <= most:
        raise ValueError(f"centre must be from 0 to {most}, got {centre}")
