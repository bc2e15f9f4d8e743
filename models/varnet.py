"""The end-to-end variational network, as fastMRI published it."""

import torch
from torch import Tensor, nn

from voxelsigma.models.fourier import fft_centred, ifft_centred
from voxelsigma.models.varnet_norm import NormUNet
from voxelsigma.models.varnet_sensitivities import SensitivityNetwork, root_sum_of_squares


class Cascade(nn.Module):
    r"""One step in k-space, :math:`k - \eta\,M (k - y) - E\,g(R\,k)`.

    With the sampled positions M, the learned weight :math:`\eta`, the normalised U-Net g, the sensitivity-combined
    image :math:`R\,k = \sum_c S_c^* F^{-1} k_c`, and the k-space of all coils :math:`(E\,x)_c = F (S_c\,x)`.
    """

    def __init__(self, *, channels: int, levels: int) -> None:
        super().__init__()
        self.model = NormUNet(channels=channels, levels=levels)
        self.dc_weight = nn.Parameter(torch.ones(1))

    def forward(self, kspace: Tensor, measured: Tensor, sensitivities: Tensor, mask: Tensor) -> Tensor:
        """K-space `(batch, coils, k1, k0)`, same shape out."""
        combined = (sensitivities.conj() * ifft_centred(kspace)).sum(dim=1)
        correction = fft_centred(sensitivities * self.model(combined).unsqueeze(1))
        return kspace - self.dc_weight * mask * (kspace - measured) - correction


class VarNet(nn.Module):
    r"""End-to-end variational network with its own sensitivities (Sriram et al., MICCAI 2020).

    .. math::
        S = \text{sensitivity network}(y), \qquad k_0 = y, \qquad
        k_{n+1} = k_n - \eta_n M (k_n - y) - E\,g_n(R\,k_n), \qquad
        f(y) = \sqrt{\textstyle\sum_c |F^{-1} k_{N,c}|^2}

    Names and shapes of the weights are those of fastMRI's VarNet, whose published ones load as they are. There the
    readout is the vertical axis of k-space, and lines lie along the horizontal one: ours, `(k1, k0)`, is turned before
    the first and after the last step, so that published weights see what they were trained on.

    Every normalisation follows the data, so :math:`f(c\,y) = c\,f(y)` for every :math:`c > 0`; normalisations and
    sensitivity network are part of the Jacobian. The output is real.

    Differences to fastMRI's code, none of which touches its own data: the calibration region of a 2D mask is a
    box, that of a fully sampled one is everything, and images without any variation give no NaN.

    Parameters
    ----------
    cascades
        Number of steps N.
    channels, levels
        Of the steps' U-Nets.
    sensitivity_channels, sensitivity_levels
        Of the sensitivity network's.
    """

    estimates_sensitivities = True

    def __init__(
        self,
        *,
        cascades: int = 12,
        channels: int = 18,
        levels: int = 4,
        sensitivity_channels: int = 8,
        sensitivity_levels: int = 4,
    ) -> None:
        super().__init__()
        self.sens_net = SensitivityNetwork(channels=sensitivity_channels, levels=sensitivity_levels)
        self.cascades = nn.ModuleList(Cascade(channels=channels, levels=levels) for _ in range(cascades))

    def forward(self, kspace: Tensor, sensitivities: Tensor | None, mask: Tensor) -> Tensor:
        """Reconstruct.

        Parameters
        ----------
        kspace
            Whitened k-space, shape `(coils, k1, k0)` or `(batch, coils, k1, k0)`, complex.
        sensitivities
            Not used: the network estimates its own.
        mask
            Sampled positions, 1 or 0, shape `(k1, k0)` or `(batch, 1, k1, k0)`, real.

        Returns
        -------
            Root-sum-of-squares images, shape `(y, x)` or `(batch, y, x)`, real.

        Raises
        ------
        ValueError
            If the centre of k-space was not sampled.
        """
        batched = kspace if kspace.dim() == 4 else kspace.unsqueeze(0)
        # (batch, coils, k1, k0) -> (batch, coils, k0, k1): readout vertical, as fastMRI has it
        sampled = mask.expand(1, 1, *mask.shape[-2:]).mT if mask.dim() < 4 else mask.mT
        measured = sampled * batched.mT
        estimated = self.sens_net(measured, sampled)
        predicted = measured
        for cascade in self.cascades:
            predicted = cascade(predicted, measured, estimated, sampled)
        images = root_sum_of_squares(ifft_centred(predicted)).mT
        return images if kspace.dim() == 4 else images.squeeze(0)
