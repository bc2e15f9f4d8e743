"""Errors of images, in units of the object that they show."""

import torch
from torch import Tensor, nn

from voxelsigma.models.scale import divided

# of training/examples.py's object
_OBJECT_THRESHOLD = 0.1
_OBJECT_PERCENTILE = 0.99


def object_magnitude(images: Tensor) -> Tensor:
    r"""Mean magnitude of each image's object.

    .. math::
        \overline{|\rho|}_\mathrm{object} = \operatorname{mean}\{|\rho_i| : |\rho_i| > 0.1\,P_{99}(|\rho|)\}

    Parameters
    ----------
    images
        Shape `(batch, y, x)`, complex or real.

    Returns
    -------
        Shape `(batch,)`, real; 0 for an image that is 0 everywhere.
    """
    magnitude = images.detach().abs().flatten(1)
    inside = magnitude > _OBJECT_THRESHOLD * quantile(magnitude, _OBJECT_PERCENTILE)[:, None]
    return (magnitude * inside).sum(dim=1) / inside.sum(dim=1).clamp(min=1)


def quantile(values: Tensor, fraction: float) -> Tensor:
    """Quantile of each row, `(batch, voxels)` to `(batch,)`, interpolated linearly as by `numpy.percentile`."""
    # torch.quantile refuses large images
    ordered = values.sort(dim=1).values
    place = fraction * (values.shape[1] - 1)
    below = int(place)
    above = min(below + 1, values.shape[1] - 1)
    return torch.lerp(ordered[:, below], ordered[:, above], place - below)


def relative_error(network: nn.Module, images: Tensor, reference: Tensor) -> Tensor:
    r"""Mean absolute error in units of the reference's object.

    .. math:: L = \operatorname{mean} \frac{|f(y) - \rho|}{\overline{|\rho|}_\mathrm{object}}

    Complex images are compared as such. Where the images are real, or the network estimates sensitivities of its own,
    so that the phase is not defined, magnitudes are compared.

    Parameters
    ----------
    network
        That made the images; its attribute `estimates_sensitivities` is read.
    images
        Shape `(batch, y, x)`, complex or real.
    reference
        Shape `(batch, y, x)`, complex or real.

    Returns
    -------
        Scalar, real. An image whose reference is 0 everywhere counts in its own units.

    Raises
    ------
    ValueError
        The shapes differ.
    """
    if images.shape != reference.shape:
        raise ValueError(
            f"loss: images of the network have shape {tuple(images.shape)}, expected {tuple(reference.shape)}, "
            "that of the reference"
        )
    if getattr(network, "estimates_sensitivities", False) or not images.is_complex():
        images, reference = images.abs(), reference.abs()
    # (batch, y, x) -> (batch,)
    errors = (images - reference).abs().mean(dim=(-2, -1))
    return divided(errors, object_magnitude(reference)).mean()
