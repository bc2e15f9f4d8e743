"""SSDU: self-supervision by data undersampling."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from voxelsigma.models.encoding import SenseEncoding
from voxelsigma.training.checks import check_number, check_whole
from voxelsigma.training.examples import Example


@dataclass(frozen=True, slots=True, kw_only=True)
class Ssdu:
    r"""Predict a part of the samples from the others.

    The sampled positions :math:`\Omega` fall into two disjoint sets, :math:`\Omega = \Theta \cup \Lambda`. The network
    sees :math:`\Theta`, the loss :math:`\Lambda`:

    .. math::
        \hat y = A_\Lambda f(y_\Theta), \qquad
        L = \frac{1}{2} \frac{\|y_\Lambda - \hat y\|_2}{\|y_\Lambda\|_2}
        + \frac{1}{2} \frac{\|y_\Lambda - \hat y\|_1}{\|y_\Lambda\|_1}

    averaged over the batch (Yaman et al., Magn Reson Med 2020, eq. 8). :math:`\Lambda` is drawn uniformly, point by
    point for masks of whole lines too, outside a small square at the centre of k-space. No reference is used, even
    where there is one. The share of labels is 20 % as in Dalmaz et al., ICML 2025; the paper itself found 40 % best.

    Parameters
    ----------
    label_share
        :math:`\rho = |\Lambda| / |\Omega|`, above 0 and below 1, rounded to whole samples.
    centre
        Side of the square that is always in :math:`\Theta`.
    """

    label_share: float = 0.2
    centre: int = 4

    def __post_init__(self) -> None:
        check_number("ssdu", "label_share", self.label_share, 0, 1)
        if self.label_share in {0, 1}:
            raise ValueError(f"ssdu: label_share must be above 0 and below 1, got {self.label_share!r}")
        check_whole("ssdu", "centre", self.centre, 0)

    def __call__(
        self, network: nn.Module, example: Example, rng: np.random.Generator, *, progress: float = 1.0
    ) -> Tensor:
        """Loss of a batch; see `Objective`. Draws the label set of one scan after the other.

        Raises
        ------
        ValueError
            The network estimates sensitivities of its own or gives real images, a mask has too few samples, or
            k-space is 0 at every label.
        """
        if getattr(network, "estimates_sensitivities", False):
            raise ValueError("ssdu: the network estimates sensitivities of its own; expected one that is given them")
        kept, labels = split_mask(example.mask, self.label_share, self.centre, rng)
        images = network(kept * example.kspace, example.sensitivities, kept)
        if not images.is_complex():
            raise ValueError("ssdu: the network's images are real; expected complex ones, as k-space is made of them")
        return kspace_error(SenseEncoding(example.sensitivities, labels).forward(images), labels * example.kspace)


def split_mask(mask: Tensor, label_share: float, centre: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Split sampled positions into those that the network sees and the labels.

    Parameters
    ----------
    mask
        Sampled positions, shape `(batch, 1, k1, k0)`, real, 1 or 0.
    label_share
        Labels over samples.
    centre
        Side of the square around index `n // 2` that holds no labels.
    rng
        Draws without replacement, for one scan after the other.

    Returns
    -------
        Masks of the seen positions and of the labels, both of the shape and type of `mask`.

    Raises
    ------
    ValueError
        A mask is too small: no label, or fewer samples outside the centre than labels.
    """
    labels = torch.zeros_like(mask, device="cpu")
    outside = mask.cpu() != 0
    rows, columns = (n // 2 - centre // 2 for n in mask.shape[-2:])
    # a square larger than the matrix begins before it
    outside[..., max(rows, 0) : rows + centre, max(columns, 0) : columns + centre] = False
    for number, samples in enumerate((mask != 0).flatten(1).sum(dim=1).tolist()):
        candidates = outside[number].flatten().nonzero().flatten().numpy()
        wanted = round(label_share * samples)
        if not 1 <= wanted <= len(candidates):
            raise ValueError(
                f"ssdu: mask {number} of the batch has {samples} samples, {len(candidates)} of them outside the "
                f"centre; expected enough for {label_share:g} of them, and at least one, as labels"
            )
        labels[number].view(-1)[torch.from_numpy(rng.choice(candidates, wanted, replace=False))] = 1
    labels = labels.to(mask)
    return mask * (1 - labels), labels


def kspace_error(predicted: Tensor, measured: Tensor) -> Tensor:
    r"""Half the relative :math:`\ell_2` error plus half the relative :math:`\ell_1` error, averaged over the batch.

    Parameters
    ----------
    predicted, measured
        Shape `(batch, coils, k1, k0)`, complex, 0 outside the labels.

    Returns
    -------
        Scalar, real.

    Raises
    ------
    ValueError
        The measured k-space of a scan is 0.
    """
    error, whole = (measured - predicted).flatten(1), measured.flatten(1)
    empty = (whole == 0).all(dim=1).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"ssdu: k-space of scans {empty} of the batch is 0 at every label; expected measured data")
    terms = [torch.linalg.vector_norm(error, p, dim=1) / torch.linalg.vector_norm(whole, p, dim=1) for p in (1, 2)]
    return 0.5 * (terms[0] + terms[1]).mean()
