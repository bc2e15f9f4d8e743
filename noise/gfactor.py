"""Noise ratios: the g-factor of a linear reconstruction, and its closed form for regular undersampling."""

import torch
from torch import Tensor


def noise_ratio(sigma: Tensor, sensitivities: Tensor, acceleration: float) -> Tensor:
    r"""Noise against that of a fully sampled scan, after the loss that fewer samples alone explain.

    .. math:: g = \frac{\sigma}{\sigma_\text{full} \sqrt{R}}, \qquad
        \sigma_\text{full} = \frac{1}{\sqrt{\sum_c |S_c|^2}}

    For a linear reconstruction without regularisation this is the g-factor (Pruessmann et al., Magn Reson Med
    1999, eq. 23), at least 1. For a network it is a noise ratio to full sampling: it may be below 1, depends on the
    image, and says nothing about lost contrast.

    Parameters
    ----------
    sigma
        Magnitude σ map, shape `(y, x)`.
    sensitivities
        Coil sensitivities, shape `(coils, y, x)`.
    acceleration
        R: encoded over acquired samples, repeats counted, on the acquired grid.

    Returns
    -------
        Shape `(y, x)`; 0 where no coil sees anything.
    """
    norm = sensitivities.abs().square().sum(dim=0).sqrt()
    return sigma * norm / acceleration**0.5


def aliasing_gfactor(sensitivities: Tensor, acceleration: int) -> Tensor:
    r"""The g-factor of unregularised SENSE under regular undersampling along y, in closed form.

    R voxels, N/R apart, fold onto each other; with the matrix S of their sensitivities, `(coils, R)`,

    .. math:: g_i = \sqrt{[(S^H S)^{-1}]_{ii} \, [S^H S]_{ii}}

    (Pruessmann et al., Magn Reson Med 1999, eq. 23, whitened data). Voxels that no coil sees take no part
    in the fold and get 0.

    Parameters
    ----------
    sensitivities
        Coil sensitivities, shape `(coils, y, x)`, complex.
    acceleration
        R; it must divide the number of rows.

    Returns
    -------
        Shape `(y, x)`, real.
    """
    coils, rows, columns = sensitivities.shape
    if rows % acceleration:
        raise ValueError(
            f"aliasing_gfactor: {rows} rows at acceleration {acceleration}; expected a divisor of the rows"
        )
    # sensitivities: (coils, y, x) -> (fold, x, coils, R)
    folded = sensitivities.reshape(coils, acceleration, rows // acceleration, columns).permute(2, 3, 0, 1)
    gram = folded.mH @ folded
    power = torch.diagonal(gram, dim1=-2, dim2=-1).real
    dead = power <= 1e-12 * power.max()
    inverse = torch.linalg.inv(gram + torch.diag_embed(dead.to(gram.dtype)))
    squared = torch.diagonal(inverse, dim1=-2, dim2=-1).real * power
    g = torch.where(dead, torch.zeros_like(squared), squared.clamp_min(0).sqrt())
    # (fold, x, R) -> (y, x)
    return g.permute(2, 0, 1).reshape(rows, columns)
