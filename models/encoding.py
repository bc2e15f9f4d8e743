"""The SENSE encoding operator for Cartesian sampling."""

from dataclasses import dataclass

from torch import Tensor

from voxelsigma.models.fourier import fft_centred, ifft_centred


@dataclass(frozen=True, slots=True)
class SenseEncoding:
    r"""From an image to the k-space that several coils see of it.

    .. math:: (A \rho)_c = M \, F \, (S_c \, \rho)

    with the coil sensitivities :math:`S_c`, the centred orthonormal Fourier transform :math:`F` and the
    sampling mask :math:`M` (Pruessmann et al., Magn Reson Med 1999, eq. 2). With unit-norm sensitivities
    :math:`\|A\| \le 1`.

    Parameters
    ----------
    sensitivities
        Coil sensitivities, shape `(..., coils, y, x)`, complex.
    mask
        Sampled positions, broadcastable to `(..., coils, y, x)`, real or boolean; 1 where sampled. Its
        square must be itself, so only 0 and 1 make `adjoint` the adjoint of `forward`'s projection.
    """

    sensitivities: Tensor
    mask: Tensor

    def forward(self, images: Tensor) -> Tensor:
        """K-space of images, `(..., y, x)` to `(..., coils, y, x)`."""
        # images: (..., y, x) -> (..., coils, y, x)
        return self.mask * fft_centred(self.sensitivities * images.unsqueeze(-3))

    def adjoint(self, kspace: Tensor) -> Tensor:
        """Zero-filled, coil-combined images of k-space, `(..., coils, y, x)` to `(..., y, x)`."""
        # kspace: (..., coils, y, x) -> (..., y, x)
        return (self.sensitivities.conj() * ifft_centred(self.mask * kspace)).sum(dim=-3)
