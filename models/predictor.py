"""The network that predicts σ maps, and what it sees of a scan and of its first probes."""

import math
from collections.abc import Mapping, Sequence
from typing import Final

import torch
from torch import Tensor

from voxelsigma.models.feature_unet import FeatureUNet
from voxelsigma.models.problem import PlaneProblem
from voxelsigma.models.surrogate_net import GRADIENT_STAGES, SurrogateNet
from voxelsigma.noise.fusion import measured_variance
from voxelsigma.noise.moments import projected
from voxelsigma.noise.prior import Prior
from voxelsigma.noise.sigma import MapKind
from voxelsigma.noise.sketch import Covariate, Sketch
from voxelsigma.noise.voxels import neighbourhood_mean, object_mask, phase_factor

KINDS: Final[tuple[MapKind, ...]] = ("magnitude", "complex")
"""Maps in the order of the predictor's outputs: the logarithms of variance and degrees of freedom of each."""

PARTS: Final[Mapping[MapKind, float]] = {"magnitude": 0.5, "complex": 1.0}
"""Part of the zero-filled image's noise energy that each kind of map is measured by."""

LAGS: Final = ((0, 1), (1, 0), (0, 2), (2, 0), (1, 1), (0, 3), (3, 0))
"""Distances (y, x) at which the noise of the zero-filled image is correlated, by the mask's point spread."""

OF_SCAN: Final = 6 + len(LAGS)
_OF_PROBES: Final = 9
FEATURES: Final = OF_SCAN + _OF_PROBES
_FIRST_SMOOTH: Final = OF_SCAN + len(KINDS)

_SMALLEST: Final = 1e-3
_SMOOTHED: Final = 5
_FREEDOM: Final = (math.log(2.0), math.log(1000.0))


class SigmaPredictor(FeatureUNet):
    r"""A U-Net without normalisation, from features of a scan to log-variances and their worth.

    .. math:: \log \frac{s_0}{v_\text{zf}}, \; \log \nu_0

    for the magnitude and the complex map, relative to the closed-form variance of the zero-filled image: what is to be
    expected of σ² after a few probes (`scan_features`, `probe_features`), and what that is worth. Levels of the
    features mean something here (how noisy, how much was sampled), so that nothing is normalised.

    Parameters
    ----------
    channels, levels
        Of the `FeatureUNet`.
    surrogate_channels, surrogate_levels, surrogate_stages
        Of the `SurrogateNet`.

    Attributes
    ----------
    surrogate
        Makes the control variate of those first probes, and of all others.
    calibration
        Factor on :math:`\nu_0` of each kind of map, shape `(kinds,)`: 1 until it is measured.
    """

    def __init__(
        self,
        *,
        channels: int = 24,
        levels: int = 3,
        surrogate_channels: int = 32,
        surrogate_levels: int = 3,
        surrogate_stages: Sequence[float] = GRADIENT_STAGES,
    ) -> None:
        super().__init__(given=FEATURES, wanted=2 * len(KINDS), channels=channels, levels=levels)
        self.surrogate = SurrogateNet(
            given=OF_SCAN, channels=surrogate_channels, levels=surrogate_levels, stages=surrogate_stages
        )
        self.calibration: Tensor
        self.register_buffer("calibration", torch.ones(len(KINDS)))
        with torch.no_grad():
            assert self.last.bias is not None
            self.last.bias.copy_(torch.tensor([0.0, math.log(10.0)] * len(KINDS)))

    def forward(self, features: Tensor) -> Tensor:
        """Predict from features `(batch, FEATURES, y, x)`.

        Returns
        -------
            `(batch, kinds, 2, y, x)`: log variance over the zero-filled one, and log degrees of freedom.
        """
        found = self.maps(features).unflatten(1, (len(KINDS), 2))
        # what the network has to say is the difference from the measured maps, smoothed
        smooth = features[:, _FIRST_SMOOTH : _FIRST_SMOOTH + len(KINDS)]
        return torch.stack([smooth + found[:, :, 0], found[:, :, 1].clamp(*_FREEDOM)], dim=2)

    @torch.no_grad()
    def predict(self, features: Tensor, zero_filled_variance: Tensor) -> dict[MapKind, Prior]:
        r"""What both maps of a scan should be.

        .. math:: s_0 = v_\text{zf} \, c_k e^{o_{k,0}}, \qquad \nu_0 = g_k e^{o_{k,1}}

        with the outputs o, the calibration g, and :math:`c = 1/2` for the magnitude map, whose component holds half
        of the noise, 1 for the complex one. Of a real reconstruction only the magnitude map means anything.

        Parameters
        ----------
        features
            Of `scan_features` and then `probe_features`, shape `(FEATURES, y, x)`.
        zero_filled_variance
            :math:`v_\text{zf}`, closed-form variance of the zero-filled image, shape `(y, x)`.

        Returns
        -------
            A prior of each kind, `(y, x)`, float64, on the device of the variance.
        """
        given = features.unsqueeze(0).to(self.last.weight.device, self.last.weight.dtype)
        variance = zero_filled_variance.double()
        # (1, kinds, 2, y, x) -> (kinds, 2, y, x)
        found = self(given)[0].double().to(variance.device)
        return {
            kind: Prior(variance=variance * PARTS[kind] * output[0].exp(), freedom=float(factor) * output[1].exp())
            for kind, output, factor in zip(KINDS, found, self.calibration, strict=True)
        }


def scan_features(image: Tensor, zero_filled: Tensor, variance: Tensor, correlation: Tensor, fraction: float) -> Tensor:
    r"""What a predictor sees of a scan; the same for a scan in other units.

    Brightness :math:`\log(|x|/m)`, the zero-filled image turned by the image's phase :math:`e^{-i\phi} z / m` (real,
    imaginary), their difference :math:`|x - z| / m`, the noise level :math:`\log(\sqrt{v}/m)`, the sampled fraction
    :math:`\log f`, and the noise's correlations :math:`|p(d)|/p(0)` at `LAGS`; m is the object's mean magnitude.

    Parameters
    ----------
    image
        The reconstruction x, shape `(y, x)`, complex or real.
    zero_filled
        z, the coil-combined zero-filled image on the same grid, `(y, x)`.
    variance
        v, closed-form variance of its noise, `(y, x)`.
    correlation
        p of `coil_correlation`.
    fraction
        f, the sampled part of k-space.

    Returns
    -------
        Shape `(features, y, x)`, float32.
    """
    level = image.abs()[object_mask(image)].mean().double()
    phase = phase_factor(image if image.is_complex() else zero_filled)
    turned = phase.conj() * zero_filled.to(torch.complex128) / level
    bright = image.abs().double() / level
    middle = correlation.shape[0] // 2
    spread = correlation.abs() / correlation[middle, middle].abs()
    planes = [
        (bright + _SMALLEST).log() / 2,
        turned.real,
        turned.imag,
        (bright - turned).abs(),
        ((variance.double().clamp_min(0).sqrt() / level) + _SMALLEST).log() + 2,
        torch.full_like(bright, math.log(fraction) + 1),
        *(torch.full_like(bright, float(spread[middle + y, middle + x])) for y, x in LAGS),
    ]
    return torch.stack(planes).float()


def plane_features(problem: PlaneProblem, kspace: Tensor, image: Tensor, covariate: Covariate) -> Tensor:
    """`scan_features` of the reconstruction of a plane.

    Parameters
    ----------
    problem, kspace
        The plane, and its data, shape `(coils, k1, k0)`.
    image
        The reconstruction, shape `(y, x)`, complex or real.
    covariate
        The plane's own.
    """
    assert covariate.correlation is not None
    sampled = problem.cropped_weights(problem.windows(symmetric=True)) > 0
    zero_filled = covariate.push(kspace.unsqueeze(0))[0]
    fraction = float(sampled.float().mean())
    return scan_features(image, zero_filled, covariate.variance, covariate.correlation, fraction)


def probe_features(state: Sketch, variance: Tensor, *, real: bool = False) -> Tensor:
    r"""What a predictor sees of the first probes; the same for a scan in other units.

    With the control variate's estimates of both maps: :math:`\log \hat\sigma^2 / (c_k v)`, the logarithm of its mean
    over 5 × 5 voxels of the object, that of the magnitude's plain mean of squares; the explained part, the covariate's
    known variance :math:`\log E|c|^2 / v`, the map's worth :math:`\log \nu / S`, and :math:`\log S / 8`.

    Parameters
    ----------
    state
        A sketch with a covariate, of some probes.
    variance
        v, closed-form variance of the zero-filled image, shape `(y, x)`.
    real
        Whether the reconstruction is real.

    Returns
    -------
        Shape `(features, y, x)`, float32; of a real image the complex map's are those of the magnitude.
    """
    assert state.covariate_variance is not None
    scale, count = variance.double(), state.sums.count
    known = scale > 0
    inside = (state.inside & known).double()
    magnitude = state.map("magnitude")
    complex_map = None if real else state.map("complex")
    measured = measured_variance(magnitude) / PARTS["magnitude"]
    both = [measured, measured if complex_map is None else measured_variance(complex_map)]
    plain = projected(state.sums.u_u, state.sums.u_abs, state.direction) / (count * PARTS["magnitude"])
    around = neighbourhood_mean(inside, _SMOOTHED)

    def level(values: Tensor) -> Tensor:
        return torch.where(known, values / torch.where(known, scale, 1), 0)

    def smoothed(values: Tensor) -> Tensor:
        mean = neighbourhood_mean(level(values) * inside, _SMOOTHED) / around.clamp_min(1e-9)
        return torch.where(around > 0, mean, level(values))

    found = [
        *(_logarithm(level(one)) for one in both),
        *(_logarithm(smoothed(one)) for one in both),
        _logarithm(level(plain)),
        magnitude.explained.double() * 2,
        _logarithm(level(state.covariate_variance)),
        (magnitude.degrees_of_freedom.double() / count).clamp(1e-3, 1e3).log(),
        torch.full_like(scale, math.log(count / 8)),
    ]
    return torch.stack(found).float()


def _logarithm(values: Tensor) -> Tensor:
    return values.clamp(1e-6, 1e6).log()
