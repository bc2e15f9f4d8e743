"""How alike two images are, and two maps."""

import torch
from skimage.metrics import structural_similarity
from torch import Tensor


def psnr(image: Tensor, reference: Tensor) -> Tensor:
    r"""Peak signal-to-noise ratio of magnitude images.

    .. math:: 20 \log_{10} \frac{\max_i |\rho_i|}{\sqrt{\operatorname{mean}_i (|x_i| - |\rho_i|)^2}}

    Parameters
    ----------
    image, reference
        Shape `(..., y, x)`, real or complex.

    Returns
    -------
        dB, shape `(...)`; infinite where the magnitudes agree.
    """
    error = (image.abs() - reference.abs()).square().mean(dim=(-2, -1)).sqrt()
    return 20 * torch.log10(reference.abs().amax(dim=(-2, -1)) / error)


def ssim(image: Tensor, reference: Tensor) -> float:
    r"""Structural similarity of two magnitude images, mean over the image.

    .. math:: \frac{(2 \mu_x \mu_\rho + c_1)(2 \sigma_{x\rho} + c_2)}
        {(\mu_x^2 + \mu_\rho^2 + c_1)(\sigma_x^2 + \sigma_\rho^2 + c_2)}, \qquad
        c_i = (k_i \max |\rho|)^2, \quad k = 0.01, 0.03

    over windows of 7 × 7 voxels (Wang et al., IEEE Trans Image Process 2004; scikit-image's implementation and
    window, as fastMRI has it).

    Parameters
    ----------
    image, reference
        Shape `(y, x)`, at least 7 × 7, real or complex.
    """
    pair = [one.abs().detach().cpu().double().numpy() for one in (image, reference)]
    return float(structural_similarity(*pair, data_range=pair[1].max()))  # type: ignore[no-untyped-call]


def correlation(found: Tensor, reference: Tensor) -> float:
    r"""Pearson's correlation coefficient of two maps, over the whole image.

    .. math:: \frac{\sum_i (a_i - \bar a)(b_i - \bar b)}{\sqrt{\sum_i (a_i - \bar a)^2 \sum_i (b_i - \bar b)^2}}

    Returns
    -------
        From -1 to 1; NaN if one of them is constant.
    """
    a, b = (one.detach().double().flatten() - one.detach().double().mean() for one in (found, reference))
    return float(a @ b / (a.norm() * b.norm()))


def normalized_error(found: Tensor, reference: Tensor) -> float:
    r"""Root mean square error of a map over the maximum of the reference, over the whole image.

    .. math:: \frac{\sqrt{\operatorname{mean}_i (a_i - b_i)^2}}{\max_i b_i}

    (NRMSE of Dalmaz et al., ICML 2025).
    """
    a, b = found.detach().double(), reference.detach().double()
    return float((a - b).square().mean().sqrt() / b.max())


def object_error(found: Tensor, reference: Tensor, inside: Tensor) -> float:
    r"""Error of a map inside an object, :math:`\|a - b\| / \|b\|` over the voxels `inside`."""
    a, b = found.detach().double()[inside], reference.detach().double()[inside]
    return float((a - b).norm() / b.norm())
